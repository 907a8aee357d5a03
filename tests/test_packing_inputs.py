"""From what collators pass to `mask_BL` and `seq_idx_BL`, and to what flash attention wants."""

import pytest
import torch
from families import small_config

from nemotron_h.packing import document_ids, padding_mask, varlen_kwargs

pytestmark = pytest.mark.core
X = torch.zeros(1, 7, 4)


def documents(mask=None, **kwargs):
    inputs = {"position_ids": None, "seq_idx": None, "cu_seq_lens": None, "cache": None} | kwargs
    rows = next(v.shape[0] for v in inputs.values() if v is not None and v.ndim == 2) if kwargs else 1
    ids = document_ids(X.expand(rows, -1, -1), mask, **inputs)
    return None if ids is None else ids.tolist()


@pytest.mark.parametrize(
    ("position_ids", "expected"),
    [
        ([0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 1, 2, 2]),
        ([0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 2, 2, 2, 2]),  # documents of one token
        ([5, 6, 7, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1, 1]),  # a document cut off at its start
        ([0, 1, 2, 3, 4, 5, 6], None),
        ([0, 1, 2, 9, 10, 11, 12], None),  # a gap is no restart
    ],
)
def test_position_ids(position_ids, expected):
    found = documents(position_ids=torch.tensor([position_ids]))
    assert found == (None if expected is None else [expected])


def test_explicit_numbers_win_over_positions():
    assert documents(
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 0, 1]]), seq_idx=torch.tensor([[4, 4, 4, 4, 4, 9, 9]])
    ) == [[0, 0, 0, 0, 0, 1, 1]]


def test_left_padding_counted_by_generate_is_not_a_pack():
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).bool()
    assert documents(mask=mask, position_ids=torch.tensor([[1, 1, 1, 0, 1, 2, 3]])) is None
    assert documents(mask=mask, position_ids=torch.tensor([[0, 0, 0, 0, 1, 0, 1]])) == [[0, 0, 0, 0, 0, 1, 1]]


def test_padding_mask():
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    assert padding_mask(None, 4) is None
    assert padding_mask(torch.ones(2, 4), 4) is None
    assert padding_mask(torch.zeros(2, 1, 4, 4), 4) is None
    assert padding_mask(mask, 4).tolist() == mask.bool().tolist()
    assert padding_mask(mask, 1) is None  # of a row with past tokens, only the new ones are asked about
    assert padding_mask(mask, 2).tolist() == [[False, True], [True, True]]


def test_flash_attention_gets_cumulative_lengths():
    config = small_config("dense")
    seq_idx = torch.tensor([[0, 0, 0, 1, 2, 2, 2]])
    config._attn_implementation = "sdpa"
    assert varlen_kwargs(config, seq_idx) == {}
    config._attn_implementation = "flash_attention_2"
    kwargs = varlen_kwargs(config, seq_idx)
    assert kwargs["cu_seq_lens_q"].tolist() == kwargs["cu_seq_lens_k"].tolist() == [0, 3, 4, 7]
    assert kwargs["cu_seq_lens_q"].dtype == torch.int32
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == 3
    with pytest.raises(ValueError, match="one row and the batch has 2"):
        varlen_kwargs(config, seq_idx.expand(2, -1))
