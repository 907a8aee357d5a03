"""nemotron_h/ops/documents.py."""

from __future__ import annotations

import torch

from nemotron_h.ops import document_index


def test_documents_are_numbered_by_change_and_not_by_value():
    seq_idx = torch.tensor([[3, 3, 1, 3, 3], [0, 0, 0, 0, 0]])
    assert document_index(seq_idx).tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 0]]


def test_it_is_idempotent_and_leaves_its_input_alone():
    seq_idx = torch.tensor([[3, 1, 1, 2]], dtype=torch.int32)
    once = document_index(seq_idx)
    assert once.dtype == torch.int64 and torch.equal(document_index(once), once)
    assert seq_idx.tolist() == [[3, 1, 1, 2]]


def test_a_pad_takes_the_document_before_it_or_the_first():
    seq_idx = torch.tensor([[9, 9, 0, 8, 0, 1, 7]])
    mask = torch.tensor([[0, 0, 1, 0, 1, 1, 0]])
    assert document_index(seq_idx, mask).tolist() == [[0, 0, 0, 0, 0, 1, 1]]
    assert document_index(seq_idx, torch.zeros_like(mask)).unique().tolist() == [0]


def test_one_position():
    assert document_index(torch.tensor([[4], [5]])).tolist() == [[0], [0]]
