"""Document boundaries: lengths, document of each token, and what is refused."""

import inspect
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ring_train.ops.documents import document_indices, document_lengths

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8).map(tuple)


@given(LENGTHS)
def test_every_token_belongs_to_one_document(lengths: tuple[int, ...]) -> None:
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    assert document_lengths(cu_seqlens, sum(lengths), None) == lengths
    assert document_lengths(cu_seqlens, sum(lengths), lengths) == lengths
    found = document_indices(cu_seqlens, sum(lengths))
    assert torch.equal(found.bincount(), torch.tensor(lengths))
    assert bool((found.diff() >= 0).all())


@pytest.mark.parametrize(
    "boundaries", [[0], [5], [0, 4], [0, 6], [1, 5], [0, 3, 3, 5], [0, 4, 2, 5], [0, -1, 5]]
)
def test_boundaries_that_do_not_rise_to_the_row_are_refused(boundaries: list[int]) -> None:
    with pytest.raises(ValueError, match="rise strictly from 0 to 5"):
        document_lengths(torch.tensor(boundaries), 5, None)


@pytest.mark.parametrize("lengths", [(5,), (3, 2), (2, 2, 1), (2, 4), (2, 3, 0), ()])
def test_lengths_that_differ_from_the_boundaries_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="differ from those of cu_seqlens"):
        document_lengths(torch.tensor([0, 2, 5]), 5, lengths)


@pytest.mark.parametrize("lengths", [(5,), (3, 3), (5, 0), (6, -1), ()])
def test_lengths_without_host_boundaries_must_fill_the_row(lengths: tuple[int, ...]) -> None:
    unread = torch.empty(3, dtype=torch.int32, device="meta")
    assert document_lengths(unread, 5, (4, 1)) == (4, 1)
    with pytest.raises(ValueError, match="2 documents of at least one token and 5 tokens"):
        document_lengths(unread, 5, lengths)


@pytest.mark.parametrize("cu_seqlens", [torch.tensor([[0, 5]]), torch.tensor([0.0, 5.0])])
def test_boundaries_of_another_kind_are_refused(cu_seqlens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="are not boundaries"):
        inspect.unwrap(document_lengths)(cu_seqlens, 5, None)
