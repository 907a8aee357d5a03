"""From what collators pass to `mask_BL` and `seq_idx_BL`, to what flash attention wants; what is no batch at all."""

import pytest
import torch
from families import small_config, small_model, tokens

from nemotron_h import NemotronHForSequenceClassification, NemotronHForTokenClassification, PromptCache
from nemotron_h.layers.masks import padding_mask, whole_mask
from nemotron_h.layers.packing import document_ids, varlen_kwargs

pytestmark = pytest.mark.core
X = torch.zeros(1, 7, 4)


def documents(mask=None, **kwargs):
    names = ("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "cache")
    inputs = dict.fromkeys(names) | kwargs
    rows = next((v.shape[0] for v in inputs.values() if v is not None and v.ndim == 2), 1)
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
    assert documents(mask=mask, position_ids=torch.tensor([[0, 0, 0, 0, 1, 7, 8]])) is None


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k"])
def test_cumulative_lengths(name):
    assert documents(**{name: torch.tensor([0, 3, 3, 7])}) == [[0, 0, 0, 1, 1, 1, 1]]
    for wrong in ([0, 3], [0, 9], [2, 7], [0, 5, 3, 7]):
        with pytest.raises(ValueError, match=r"cu_seq_lens is \[.*\] for a row of 7 tokens: it must rise from 0 to 7"):
            documents(**{name: torch.tensor(wrong)})


def test_cumulative_lengths_that_differ():
    with pytest.raises(ValueError, match="differ"):
        documents(cu_seq_lens_q=torch.tensor([0, 3, 7]), cu_seq_lens_k=torch.tensor([0, 4, 7]))


def test_one_row_of_positions_serves_every_row():
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    expected = [[0, 0, 0, 1, 1, 1, 1]] * 2
    for given in (positions, positions[None], positions.expand(2, -1)):
        assert document_ids(X.expand(2, -1, -1), None, given, None, None, None, None).tolist() == expected
    for name in ("position_ids", "seq_idx"):
        with pytest.raises(ValueError, match=rf"{name} has shape \(3, 7\) for 2 rows of 7 tokens"):
            given = {"position_ids": None, "seq_idx": None, name: positions.expand(3, -1)}
            document_ids(X.expand(2, -1, -1), None, given["position_ids"], given["seq_idx"], None, None, None)


def test_a_mask_fits_the_batch():
    mask = torch.ones(1, 9)
    assert whole_mask(mask, 2, 9, 0).shape == (2, 9)
    assert whole_mask(torch.ones(2, 20), 2, 9, 0).shape == (2, 20)
    with pytest.raises(ValueError, match="has 9 columns for 0 cached and 10 new tokens: pass 10"):
        whole_mask(mask, 1, 10, 0)
    with pytest.raises(ValueError, match="has 3 rows for a batch of 2"):
        whole_mask(torch.ones(3, 9), 2, 9, 0)


def test_padding_mask():
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    assert padding_mask(None, 4) is None
    assert padding_mask(torch.ones(2, 4), 4) is None
    assert padding_mask(torch.zeros(2, 1, 4, 4), 4) is None
    assert padding_mask(mask, 4).tolist() == mask.bool().tolist()
    # columns after the new tokens' are not theirs
    assert padding_mask(mask, 2) is None
    assert padding_mask(mask, 3).tolist() == [[True, True, False], [True, True, True]]


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


IDS, EMBEDS = tokens(2, 7), torch.zeros(2, 7, 32)
LONG = tokens(1, 300)  # long enough to ask whether it goes through in pieces


@pytest.mark.parametrize(
    "called", ["model", "backbone", "generate", "prompt_cache", "rows_classified", "tokens_classified"]
)
@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"input_ids": IDS[:0]}, r"input_ids has shape \(0, 7\), a batch of 0 rows|The batch has 0 prompts"),
        ({"input_ids": LONG[:0]}, r"input_ids has shape \(0, 300\), a batch of 0 rows|The batch has 0 prompts"),
        ({"input_ids": IDS[0]}, r"input_ids has shape \(7,\): pass \(rows, tokens\), as input_ids\[None\] for one row"),
        ({"input_ids": LONG[0]}, r"input_ids has shape \(300,\): pass \(rows, tokens\), as input_ids\[None\]"),
        ({"input_ids": IDS[0, 0]}, r"input_ids has shape \(\): pass \(rows, tokens\)"),
        ({"input_ids": IDS[None]}, r"input_ids has shape \(1, 2, 7\): pass \(rows, tokens\)"),
        ({"input_ids": IDS.tolist()}, "input_ids is a list: pass a tensor"),
        ({"input_ids": IDS[:1].double()}, "input_ids is of torch.float64: pass token ids as torch.int64"),
        ({"input_ids": IDS[:1] > 3}, "input_ids is of torch.bool: pass token ids as torch.int64"),
        ({"input_ids": IDS[:1] * 0 - 100}, "ids from -100 to -100, and not all of them are in the vocabulary"),
        ({"input_ids": torch.tensor([[3, 97, 5]])}, "ids from 3 to 97, and not all of them are in the vocabulary"),
        ({"inputs_embeds": EMBEDS[:0]}, r"inputs_embeds has shape \(0, 7, 32\), a batch of 0 rows|not embeddings"),
        (
            {"inputs_embeds": EMBEDS[0]},
            r"inputs_embeds has shape \(7, 32\): pass \(rows, tokens, 32\), as inputs_embeds",
        ),
        ({"inputs_embeds": EMBEDS[..., :31]}, r"inputs_embeds has shape \(2, 7, 31\): pass \(rows, tokens, 32\)"),
    ],
)
def test_what_is_no_batch_of_rows_is_said_in_a_sentence(called, given, sentence):
    model = small_model().eval()
    classifiers = {"rows": NemotronHForSequenceClassification, "tokens": NemotronHForTokenClassification}
    calls = {
        "model": model,
        "backbone": model.model,
        "generate": lambda **inputs: model.generate(**inputs, max_new_tokens=2),
        "prompt_cache": lambda **inputs: model.generate(**inputs, max_new_tokens=2, prompt_cache=PromptCache()),
        **{f"{name}_classified": kind(small_config(pad_token_id=0)) for name, kind in classifiers.items()},
    }
    with torch.no_grad(), pytest.raises(ValueError, match=sentence):
        calls[called](**given)


def test_ids_of_32_bits_are_ids():
    model = small_model().eval()
    assert torch.equal(model(input_ids=IDS.int()).logits, model(input_ids=IDS).logits)
