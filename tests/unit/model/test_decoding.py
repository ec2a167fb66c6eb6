"""A slot of a cache forgets the sequence that had it before."""

import pytest
import torch

import ring_train.platform  # noqa: F401  (before the first import of megatron-core)
from ring_train.model.decoding import KeyValueCache
from ring_train.model.documents import Admission, Decoding, make_generation_documents

HEADS, DIM = 2, 4


def attend(cache: KeyValueCache, rows: torch.Tensor, lengths: list[int], prompt: int) -> None:
    """Go on with sequences of these lengths, or admit a prompt to slot 0, in one row."""
    places = torch.arange(prompt)
    admission = Admission(
        first_slot=0,
        sources=torch.zeros(1, dtype=torch.int64),
        tokens=places,
        slots=torch.zeros_like(places),
        positions=places,
    )
    decoding = Decoding(
        caches={},
        num_sequences=len(lengths),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        longest=max(lengths, default=0),
        admission=admission if prompt else None,
    )
    documents = make_generation_documents([prompt] * bool(prompt), decoding, rows.device)
    cache.attend(rows, rows, rows, documents=documents, scale=0.5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_freed_slot_leaves_nothing_behind(wrong: float) -> None:
    cache = KeyValueCache(1)
    attend(cache, torch.full((6, HEADS, DIM), wrong), [], 6)
    rows = torch.ones(3, HEADS, DIM)
    attend(cache, rows[:2], [], 2)
    attend(cache, rows[2:], [2], 0)
    for cached in (cache.keys, cache.values):
        assert (cached[0, :3] == 1).all()
        assert not cached[0, 3:].any()
