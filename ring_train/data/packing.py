"""Rows of whole documents: best-fit decreasing into bins of one sequence length.

A document longer than a row is cut into full rows and a rest; the rests and the short documents,
longest first, each go where the least space that suffices is left. Nothing else is cut.

Source of the method: H. Ding et al., Fewer truncations improve language modeling,
arXiv 2404.10830, section 3.
"""

import dataclasses
from typing import Any

import numpy as np

from ring_train.data.compiled import quick
from ring_train.data.errors import DataError
from ring_train.data.shards import Shard

INTERPRETED_PIECES = 2_000


@dataclasses.dataclass(frozen=True, slots=True)
class PackedRows:
    """The pieces of all rows of an epoch, row by row."""

    row_starts: np.ndarray
    """[rows + 1] int64: where the pieces of each row begin."""
    documents: np.ndarray
    """[pieces] uint32: number of the document in its shard."""
    begins: np.ndarray
    """[pieces] int64: offset of the first token within the document."""
    lengths: np.ndarray
    """[pieces] int64: tokens; at most seq_length in all in a row."""


def pack_rows(
    shard: Shard, documents: np.ndarray | None, seq_length: int, *, cut: bool
) -> PackedRows:
    """Return the rows that hold every token of the given documents once.

    Args:
        shard: where the documents are.
        documents: their numbers; None for all.
        seq_length: tokens of a row.
        cut: whether a longer document is cut; else it is refused.

    Raises:
        DataError: a document is longer than a row and may not be cut.
    """
    numbers = np.arange(shard.num_documents) if documents is None else documents
    lengths = shard.lengths[numbers].astype(np.int64)
    too_long = lengths > seq_length
    if not cut and too_long.any():
        worst = int(numbers[int(lengths.argmax())])
        raise DataError(
            f"{shard.prefix}: {int(too_long.sum())} documents are longer than seq_length="
            f"{seq_length} and data.packing=whole does not cut them; document {worst} has "
            f"{int(lengths.max())} tokens: raise the sequence length, or leave them out with "
            f"data.domains.NAME.max_document_tokens={seq_length}"
        )
    full_rows = lengths // seq_length
    owners = np.repeat(np.arange(len(numbers)), full_rows)
    nth = np.arange(len(owners)) - np.repeat(np.cumsum(full_rows) - full_rows, full_rows)
    rests = np.flatnonzero(lengths % seq_length)
    rests = rests[np.argsort(-(lengths[rests] % seq_length), kind="stable")]
    rest_lengths = lengths[rests] % seq_length
    rows, num_rows = _packed(rest_lengths, seq_length)
    by_row = np.argsort(rows, kind="stable")
    return PackedRows(
        row_starts=np.concatenate(
            [
                np.arange(len(owners), dtype=np.int64),
                len(owners) + np.searchsorted(rows[by_row], np.arange(num_rows + 1)),
            ]
        ),
        documents=numbers[np.concatenate([owners, rests[by_row]])].astype(np.uint32),
        begins=np.concatenate([nth, full_rows[rests[by_row]]]) * seq_length,
        lengths=np.concatenate(
            [np.full(len(owners), seq_length, dtype=np.int64), rest_lengths[by_row]]
        ),
    )


def _packed(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Return (row of each piece [n] int64, number of rows) of pieces in the order given."""
    leaves = 1 << capacity.bit_length()
    scratch: list[Any] = [[-1] * (capacity + 1), [-1] * len(lengths), [0] * (2 * leaves)]
    pieces: Any = lengths.tolist()
    rows: Any = [0] * len(lengths)
    best_fit = quick(_best_fit, len(lengths), INTERPRETED_PIECES)
    if best_fit is not _best_fit:
        scratch = [np.array(values, dtype=np.int64) for values in scratch]
        pieces, rows = lengths, np.zeros(len(lengths), dtype=np.int64)
    num_rows = best_fit(pieces, capacity, leaves, *scratch, rows)
    return np.array(rows, dtype=np.int64), num_rows


def _best_fit(  # noqa: C901  (compiled as one function)
    lengths: Any, capacity: int, leaves: int, heads: Any, nexts: Any, tree: Any, rows: Any
) -> int:
    """Fill `rows` with the row of each piece; return how many there are.

    `heads[space]` begins a list, through `nexts`, of the rows with that much space; `tree` counts
    non-empty lists below each node of a binary tree over the spaces.
    """
    num_rows = 0
    for piece in range(len(lengths)):
        length = lengths[piece]
        node = length + leaves
        while node > 1 and tree[node] == 0:  # up to the first subtree to the right with a row
            while node > 1 and node % 2 == 1:
                node //= 2
            if node > 1:
                node += 1
        if node <= 1:
            row, space = num_rows, capacity
            num_rows += 1
        else:
            while node < leaves:
                node *= 2
                if tree[node] == 0:
                    node += 1
            space = node - leaves
            row = heads[space]
            heads[space] = nexts[row]
            if heads[space] < 0:
                while node >= 1:
                    tree[node] -= 1
                    node //= 2
        rows[piece] = row
        left = space - length
        if heads[left] < 0:
            node = left + leaves
            while node >= 1:
                tree[node] += 1
                node //= 2
        nexts[row] = heads[left]
        heads[left] = row
    return num_rows
