"""The rows of one domain, as a pure function of (seed, name, position).

An epoch is one pass over a domain in an order of its own. It is shuffled here, with words of
numpy's Philox bit generator, which are the same in every version; its permutations need not be.

- contiguous: the documents of an epoch lie end to end and epochs follow each other. The row at
  position p covers tokens p .. p + s: s tokens and the label of the last, which is also the first
  token of the row after it. No token is lost, none is repeated.
- packed: rows of whole documents (see `packing`), shuffled anew in each epoch.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ring_train.data.batch import Row
from ring_train.data.compiled import quick
from ring_train.data.index import IndexFolder
from ring_train.data.packing import PackedRows, pack_rows
from ring_train.data.shards import Shard

INTERPRETED_SHUFFLE = 50_000


@dataclasses.dataclass(frozen=True, slots=True)
class Pieces:
    """What one row is made of, in order; the token that is only a label is included."""

    documents: np.ndarray
    """[pieces] number of the document in its shard."""
    begins: np.ndarray
    """[pieces] offset of the first token within the document."""
    ends: np.ndarray
    """[pieces] offset after the last one."""
    epochs: np.ndarray
    """[pieces] pass over the domain, from 0."""


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """Which documents of a shard a domain consists of, by tokens."""

    min_tokens: int = 0
    max_tokens: int | None = None

    def documents(self, lengths: np.ndarray) -> np.ndarray | None:
        """Return the numbers of the selected documents; None for all of them."""
        if self.min_tokens <= 1 and self.max_tokens is None:
            return None
        top = np.iinfo(np.int64).max if self.max_tokens is None else self.max_tokens
        return np.flatnonzero((lengths >= self.min_tokens) & (lengths <= top))


class DomainStream(Protocol):
    """Rows of a domain, at positions that any phase can go on from."""

    shard: Shard

    def step(self, seq_length: int) -> int:
        """Return by how much the position grows from one row to the next."""
        ...

    @property
    def epoch_length(self) -> int:
        """How much the position grows in one pass over the domain."""
        ...

    def pieces(self, position: int, seq_length: int) -> Pieces:
        """Return what the row at a position is made of."""
        ...

    def num_tokens(self, position: int, num_rows: int, seq_length: int) -> int:
        """Return the tokens of consecutive rows, padding and labels past the end left out."""
        ...


class ContiguousStream:
    """Documents end to end; a position counts tokens.

    Args:
        name: of the domain; with the seed it decides the order, whatever other domains there are.
        shard: its documents.
        index: where document orders are kept.
        seed: of the run.
        selection: which documents belong to the domain.
    """

    def __init__(
        self, name: str, shard: Shard, index: IndexFolder, *, seed: int, selection: Selection
    ) -> None:
        self.shard = shard
        self._index, self._key, self._selection = index, stream_key(seed, name), selection
        self._epoch = functools.lru_cache(maxsize=2)(self._open_epoch)

    def step(self, seq_length: int) -> int:
        """Return the tokens from one row to the next."""
        return seq_length

    @functools.cached_property
    def epoch_length(self) -> int:
        """Tokens of the selected documents."""
        return int(self._epoch(0)[1][-1])

    def pieces(self, position: int, seq_length: int) -> Pieces:
        """Return the documents behind seq_length + 1 tokens."""
        parts = []
        missing = seq_length + 1
        while missing > 0:
            epoch, offset = divmod(position, self.epoch_length)
            order, starts = self._epoch(epoch)
            stop = min(offset + missing, self.epoch_length)
            first = int(np.searchsorted(starts, offset, side="right")) - 1
            last = int(np.searchsorted(starts, stop, side="left"))
            begin_of = starts[first:last]
            begins = np.maximum(begin_of, offset) - begin_of
            ends = np.minimum(starts[first + 1 : last + 1], stop) - begin_of
            parts.append((order[first:last], begins, ends, np.full(last - first, epoch)))
            position += stop - offset
            missing -= stop - offset
        if len(parts) == 1:
            return Pieces(*parts[0])
        return Pieces(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def num_tokens(self, position: int, num_rows: int, seq_length: int) -> int:
        """Return num_rows * seq_length: rows are full, wherever they begin."""
        return num_rows * seq_length

    def _open_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (document order [n] uint32, where each begins in the epoch [n + 1] int64)."""
        made_from = {
            **{"key": self._key, "epoch": epoch, "shard": self.shard.sha256},
            **dataclasses.asdict(self._selection),
        }

        def build_order() -> np.ndarray:
            selected = self._selection.documents(self.shard.lengths)
            count = self.shard.num_documents if selected is None else len(selected)
            order = shuffled(count, self._key, epoch)
            return order if selected is None else selected[order].astype(np.uint32)

        order = self._index.array("order", made_from, build_order, self.shard.num_documents)

        def build_starts() -> np.ndarray:
            starts = np.zeros(len(order) + 1, dtype=np.int64)
            np.cumsum(self.shard.lengths[order], out=starts[1:])
            return starts

        return order, self._index.array("starts", made_from, build_starts, len(order))


class PackedStream:
    """Rows of whole documents for one sequence length; a position counts rows.

    Args:
        name: of the domain.
        shard: its documents.
        index: where packings and row orders are kept.
        seed: of the run.
        selection: which documents belong to the domain.
        seq_length: of every row.
        cut: whether longer documents are cut, or refused.
    """

    def __init__(
        self,
        name: str,
        shard: Shard,
        index: IndexFolder,
        *,
        seed: int,
        selection: Selection,
        seq_length: int,
        cut: bool,
    ) -> None:
        self.shard, self.seq_length = shard, seq_length
        self._index, self._key = index, stream_key(seed, name)
        made_from: dict[str, Any] = {
            **{"shard": shard.sha256, "seq_length": seq_length, "cut": cut},
            **dataclasses.asdict(selection),
        }
        packed = functools.cache(
            lambda: pack_rows(shard, selection.documents(shard.lengths), seq_length, cut=cut)
        )

        def part(name: str) -> np.ndarray:
            build: Callable[[], np.ndarray] = lambda: getattr(packed(), name)  # noqa: E731
            return index.array(f"pack_{name}", made_from, build, shard.num_documents)

        self.rows = PackedRows(*(part(f.name) for f in dataclasses.fields(PackedRows)))
        self._order = functools.lru_cache(maxsize=2)(self._open_order)
        self._made_from = made_from

    def step(self, seq_length: int) -> int:
        """Return 1: a position counts rows."""
        assert seq_length == self.seq_length, "the plan keeps to one length a packed domain"
        return 1

    @property
    def epoch_length(self) -> int:
        """Rows of one epoch."""
        return len(self.rows.row_starts) - 1

    def pieces(self, position: int, seq_length: int) -> Pieces:
        """Return the documents of one row, and of the next token where the last one goes on."""
        epoch, place = divmod(position, self.epoch_length)
        row = int(self._order(epoch)[place])
        part = slice(*self.rows.row_starts[row : row + 2].tolist())
        documents, begins = self.rows.documents[part], self.rows.begins[part]
        ends = begins + self.rows.lengths[part]
        goes_on = ends[-1] < self.shard.lengths[documents[-1]]
        if goes_on:
            ends = np.append(ends[:-1], ends[-1] + 1)
        return Pieces(documents, begins, ends, np.full(len(documents), epoch))

    def num_tokens(self, position: int, num_rows: int, seq_length: int) -> int:
        """Return the tokens of the pieces of consecutive rows."""
        assert seq_length == self.seq_length
        total, place = 0, position
        while place < position + num_rows:
            epoch, first = divmod(place, self.epoch_length)
            count = min(self.epoch_length - first, position + num_rows - place)
            total += int(self._row_tokens[self._order(epoch)[first : first + count]].sum())
            place += count
        return total

    @functools.cached_property
    def _row_tokens(self) -> np.ndarray:
        """[rows] tokens of each row of the packing."""
        ends = np.cumsum(self.rows.lengths)[self.rows.row_starts[1:] - 1]
        return np.diff(ends, prepend=0)

    def _open_order(self, epoch: int) -> np.ndarray:
        made_from = {**self._made_from, "key": self._key, "epoch": epoch}
        return self._index.array(
            "rows",
            made_from,
            lambda: shuffled(self.epoch_length, self._key, epoch),
            self.epoch_length,
        )


def read_row(stream: DomainStream, position: int, seq_length: int, domain: int) -> Row:
    """Return the row of a stream at a position, labelled with the index of its domain."""
    pieces = stream.pieces(position, seq_length)
    shard = stream.shard
    firsts = shard.begins(pieces.documents) + pieces.begins
    lengths = pieces.ends - pieces.begins
    spans = list(zip(firsts.tolist(), (firsts + lengths).tolist(), strict=True))
    starts = np.cumsum(lengths)
    num_tokens = int(starts[-1])
    missing = seq_length + 1 - num_tokens
    tail = [np.zeros(missing, dtype=shard.tokens.dtype)] if missing else []
    tokens = np.concatenate([*(shard.tokens[a:b] for a, b in spans), *tail])
    mask = None
    if shard.loss_mask is not None:
        mask = np.concatenate(
            [*(shard.loss_mask[a:b] for a, b in spans), np.zeros(missing, dtype=bool)]
        )
    return Row(
        tokens=tokens,
        domain=domain,
        document_starts=starts if missing else starts[:-1],
        num_padding=max(0, missing - 1),
        loss_mask=mask,
    )


def stream_key(seed: int, name: str) -> int:
    """Return the 64-bit key of a domain's shuffles."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def shuffled(count: int, key: int, epoch: int) -> np.ndarray:
    """Return 0..count-1 in a random order as uint32: a pure function of the arguments."""
    words = (_words(count, key, epoch) >> np.uint64(33)).astype(np.int64)
    shuffle = quick(_shuffle, count, INTERPRETED_SHUFFLE)
    if shuffle is _shuffle:
        order = list(range(count))
        shuffle(order, words.tolist())
        return np.array(order, dtype=np.uint32)
    numbers = np.arange(count, dtype=np.uint32)
    shuffle(numbers, words)
    return numbers


def _words(count: int, key: int, epoch: int) -> np.ndarray:
    """Return [count] uint64 random words of a 64-bit key and a counter."""
    return np.random.Philox(key=np.array([key, epoch], dtype=np.uint64)).random_raw(count)


def _shuffle(order: Any, words: Any) -> None:
    """Shuffle in place by R. Durstenfeld's algorithm with 31-bit random words."""
    for last in range(len(order) - 1, 0, -1):
        chosen = (words[last] * (last + 1)) >> 31
        kept = order[last]
        order[last] = order[chosen]
        order[chosen] = kept
