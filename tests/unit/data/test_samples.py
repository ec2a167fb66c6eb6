"""Rows of a domain: nothing lost, nothing repeated, boundaries exact."""

import itertools
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_train.data import packing, samples
from ring_train.data.batch import Row
from ring_train.data.errors import DataError
from ring_train.data.index import IndexFolder
from ring_train.data.samples import (
    ContiguousStream,
    DomainStream,
    PackedStream,
    Selection,
    read_row,
    shuffled,
)
from ring_train.data.shards import Shard


def make_shard(lengths: list[int], *, masked: bool = False) -> Shard:
    """Return a shard whose token ids are all different, and odd ones not trained if `masked`."""
    numbers = np.array(lengths, dtype=np.int32)
    tokens = np.arange(numbers.sum(), dtype=np.int32)
    offsets = (np.cumsum(numbers, dtype=np.int64) - numbers) * tokens.itemsize
    manifest = {"bin_sha256": str(lengths), "idx_sha256": ""}
    return Shard("test", tokens, numbers, offsets, manifest, tokens % 2 == 0 if masked else None)


def contiguous(shard: Shard, *, name: str = "code", seed: int = 0) -> ContiguousStream:
    index = IndexFolder(Path(tempfile.mkdtemp(dir=scratch)))
    return ContiguousStream(name, shard, index, seed=seed, selection=Selection())


def packed(shard: Shard, seq_length: int, *, cut: bool = True, seed: int = 0) -> PackedStream:
    return PackedStream(
        "code",
        shard,
        IndexFolder(Path(tempfile.mkdtemp(dir=scratch))),
        seed=seed,
        selection=Selection(),
        seq_length=seq_length,
        cut=cut,
    )


scratch = tempfile.mkdtemp()


@pytest.fixture(scope="module", autouse=True)
def _remove_scratch():
    yield
    shutil.rmtree(scratch)


def documents_of(shard: Shard) -> list[np.ndarray]:
    return np.split(shard.tokens, np.cumsum(shard.lengths)[:-1])


def row(stream: DomainStream, index: int, seq_length: int) -> Row:
    return read_row(stream, index * stream.step(seq_length), seq_length, 2)


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=12)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 15), st.integers(0, 5), st.integers(1, 3))
def test_contiguous_rows_are_shuffled_epochs_of_whole_documents(
    lengths: list[int], s: int, seed: int, num_epochs: int
) -> None:
    shard = make_shard(lengths)
    stream = contiguous(shard, seed=seed)
    num_rows = -(-num_epochs * shard.num_tokens // s)
    rows = [row(stream, index, s) for index in range(num_rows)]
    for one, after in itertools.pairwise(rows):
        assert one.tokens[-1] == after.tokens[0]
    tokens = np.concatenate([one.tokens[:-1] for one in rows])[: num_epochs * shard.num_tokens]
    starts = {i * s + p for i, one in enumerate(rows) for p in one.document_starts}
    pieces = np.split(tokens, sorted(p for p in starts if p < len(tokens)))
    known = sorted(tuple(document.tolist()) for document in documents_of(shard))
    for epoch in range(num_epochs):
        found = pieces[epoch * len(lengths) : (epoch + 1) * len(lengths)]
        assert sorted(tuple(piece.tolist()) for piece in found) == known
    assert all(one.domain == 2 and one.num_padding == 0 for one in rows)


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 15), st.integers(0, 5))
def test_packed_rows_hold_each_token_of_an_epoch_once(
    lengths: list[int], s: int, seed: int
) -> None:
    shard = make_shard(lengths)
    stream = packed(shard, s, seed=seed)
    for epoch in range(2):
        first = epoch * stream.epoch_length
        rows = [row(stream, first + index, s) for index in range(stream.epoch_length)]
        found: Counter[int] = Counter()
        for one in rows:
            num_real = s - one.num_padding
            found.update(one.tokens[:num_real].tolist())
            pieces = np.split(one.tokens[:num_real], one.document_starts)
            pieces = [piece for piece in pieces if len(piece)]
            for piece in pieces:
                document = next(d for d in documents_of(shard) if piece[0] in d)
                whole = len(document) <= s
                assert not whole or piece.tolist() == document.tolist()
                assert np.isin(piece, document).all()
            last = next(d for d in documents_of(shard) if pieces[-1][-1] in d)
            goes_on = pieces[-1][-1] != last[-1]
            assert goes_on == (s not in one.document_starts and one.num_padding == 0)
            if goes_on:
                assert one.tokens[s] == pieces[-1][-1] + 1
        assert found == Counter(shard.tokens.tolist())
        assert stream.num_tokens(first, stream.epoch_length, s) == shard.num_tokens


@settings(deadline=None)
@given(LENGTHS, st.integers(20, 30), st.integers(0, 5))
def test_whole_rows_cut_nothing_and_tokens_between_rows_add_up(
    lengths: list[int], s: int, seed: int
) -> None:
    shard = make_shard(lengths)
    stream = packed(shard, s, cut=False, seed=seed)
    num = 2 * stream.epoch_length + 1
    counts = [s - row(stream, i, s).num_padding for i in range(num)]
    assert [stream.num_tokens(i, 1, s) for i in range(num)] == counts
    assert stream.num_tokens(1, num - 1, s) == sum(counts[1:])


def test_best_fit_leaves_little_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, 3000).tolist()  # compiled at this size
    shard = make_shard(lengths)
    stream = packed(shard, 256)
    assert 256 * stream.epoch_length < 1.005 * shard.num_tokens
    cut = sum(length > 256 for length in lengths)
    assert len(stream.rows.documents) == len(lengths) + cut


def test_a_document_that_does_not_fit_a_whole_row_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"1 documents are longer than seq_length=8.*document 1 has"
    ):
        packed(make_shard([3, 9, 8]), 8, cut=False)


def test_the_loss_mask_goes_with_the_tokens() -> None:
    shard = make_shard([5, 9, 3], masked=True)
    for stream in (contiguous(shard), packed(shard, 7)):
        one = row(stream, 1, 7)
        real = 7 - one.num_padding if len(one.tokens) - 1 in one.document_starts else 8
        real = min(real, 7 - one.num_padding) if one.num_padding else real
        assert one.loss_mask is not None
        assert one.loss_mask[:real].tolist() == (one.tokens[:real] % 2 == 0).tolist()
        assert not one.loss_mask[real:].any()


def test_a_row_longer_than_the_corpus_spans_epochs() -> None:
    one = row(contiguous(make_shard([2, 3])), 0, 19)
    assert sorted(one.tokens[:5].tolist()) == sorted(one.tokens[5:10].tolist()) == [0, 1, 2, 3, 4]
    assert len(one.tokens) == 20
    assert len(one.document_starts) == 7


def test_epochs_seeds_and_names_have_different_orders() -> None:
    shard = make_shard([1] * 50)
    stream = contiguous(shard, seed=1)
    orders = [row(stream, index, 50).tokens[:50].tolist() for index in (0, 1)]
    orders.append(row(contiguous(shard, seed=2), 0, 50).tokens[:50].tolist())
    orders.append(row(contiguous(shard, seed=1, name="math"), 0, 50).tokens[:50].tolist())
    for one, other in itertools.combinations(orders, 2):
        assert one != other
        assert sorted(one) == sorted(other)


def test_rows_can_be_asked_for_in_any_order() -> None:
    shard = make_shard([5, 9, 3, 30, 1])
    stream, fresh = contiguous(shard, seed=3), contiguous(shard, seed=3)
    forward = [row(stream, index, 7).tokens.tolist() for index in range(40)]
    assert [row(fresh, i, 7).tokens.tolist() for i in reversed(range(40))] == forward[::-1]


def test_a_selection_leaves_documents_out() -> None:
    shard = make_shard([5, 9, 3, 30, 1])
    selection = Selection(min_tokens=4, max_tokens=10)
    stream = ContiguousStream(
        "code", shard, IndexFolder(Path(tempfile.mkdtemp(dir=scratch))), seed=0, selection=selection
    )
    assert stream.epoch_length == 14
    assert sorted(row(stream, 0, 14).tokens[:14].tolist()) == [*range(14)]


@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 3))
def test_a_shuffle_holds_every_number_once(count: int, key: int, epoch: int) -> None:
    assert sorted(shuffled(count, key, epoch).tolist()) == [*range(count)]


def test_compiled_and_interpreted_shuffles_and_packings_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 500)
    interpreted = shuffled(500, 7, 2), packing._packed(lengths, 90)
    monkeypatch.setattr(samples, "INTERPRETED_SHUFFLE", 0)
    monkeypatch.setattr(packing, "INTERPRETED_PIECES", 0)
    assert np.array_equal(shuffled(500, 7, 2), interpreted[0])
    rows, num_rows = packing._packed(lengths, 90)
    assert np.array_equal(rows, interpreted[1][0])
    assert num_rows == interpreted[1][1]


def test_a_shuffle_never_changes() -> None:
    assert shuffled(8, 1234, 0).tolist() == FIRST_SHUFFLE


FIRST_SHUFFLE = [0, 3, 4, 7, 2, 5, 6, 1]
"""Recorded once: another order would change what every resumed run reads."""
