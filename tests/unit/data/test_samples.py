"""Rows of a domain: nothing lost, nothing repeated, boundaries exact."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_train.data.samples import DomainStream, build_streams
from ring_train.data.shards import Shard


def make_shard(lengths: list[int]) -> Shard:
    """Return a shard whose token ids are all different."""
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Shard("test", np.arange(bounds[-1], dtype=np.int32), bounds, {})


def documents_of(shard: Shard) -> list[np.ndarray]:
    return np.split(shard.tokens, shard.bounds[1:-1])


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=12)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 15), st.integers(0, 5), st.integers(1, 3))
def test_rows_end_to_end_are_shuffled_epochs_of_whole_documents(
    lengths: list[int], s: int, seed: int, num_epochs: int
) -> None:
    shard = make_shard(lengths)
    stream = DomainStream("code", shard, seed=seed, seq_length=s)
    num_rows = -(-num_epochs * shard.num_tokens // s)
    rows = [stream.row(index, domain=2) for index in range(num_rows)]
    for row, after in itertools.pairwise(rows):
        assert row.tokens[-1] == after.tokens[0]
    tokens = np.concatenate([row.tokens[:-1] for row in rows])
    starts = [i * s + p for i, row in enumerate(rows) for p in row.document_starts if p < s]
    starts += [i * s for i in range(1, num_rows) if s in rows[i - 1].document_starts]
    known = {tuple(document.tolist()) for document in documents_of(shard)}
    pieces = np.split(tokens, sorted(starts))
    place = 0
    for epoch in range(num_epochs):
        found = []
        while place < len(pieces) and sum(map(len, found)) < shard.num_tokens:
            found.append(tuple(pieces[place].tolist()))
            place += 1
        if epoch < num_epochs - 1 or len(tokens) % shard.num_tokens == 0:
            assert sorted(found) == sorted(known)
        else:
            assert sum(map(len, found)) >= shard.num_tokens or set(found[:-1]) <= known
    assert all(row.domain == 2 for row in rows)


def test_a_row_longer_than_the_corpus_spans_epochs() -> None:
    shard = make_shard([2, 3])
    row = DomainStream("code", shard, seed=0, seq_length=19).row(0, 0)
    assert sorted(row.tokens[:5].tolist()) == sorted(row.tokens[5:10].tolist()) == [0, 1, 2, 3, 4]
    assert len(row.tokens) == 20
    assert len(row.document_starts) == 7


def test_epochs_and_seeds_have_different_orders_and_domains_are_independent() -> None:
    shard = make_shard([1] * 50)
    epochs = DomainStream("code", shard, seed=1, seq_length=50)
    first, second = (epochs.row(index, 0).tokens.tolist() for index in (0, 1))
    other = DomainStream("code", shard, seed=2, seq_length=50).row(0, 0).tokens.tolist()
    assert first != second
    assert first != other
    alone = build_streams({"code": shard}, seed=1, seq_length=50)[0]
    both = build_streams({"code": shard, "a": make_shard([60])}, seed=1, seq_length=50)[1]
    assert alone.row(0, 0).tokens.tolist() == both.row(0, 0).tokens.tolist() == first


def test_rows_can_be_asked_for_in_any_order() -> None:
    shard = make_shard([5, 9, 3, 30, 1])
    stream = DomainStream("code", shard, seed=3, seq_length=7)
    forward = [stream.row(index, 0).tokens.tolist() for index in range(40)]
    fresh = DomainStream("code", shard, seed=3, seq_length=7)
    assert [fresh.row(index, 0).tokens.tolist() for index in reversed(range(40))] == forward[::-1]
