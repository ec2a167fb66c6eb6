"""Context parallelism: which tokens of a packed row each rank holds, and what that means.

A row of t tokens is cut into 2 cp segments of one length; rank r holds segments r and 2 cp - 1 - r
(zigzag), so that every rank has the same share of causal softmax attention. No layer ever converts
to another order: lightning attention passes one state per segment, whatever rank holds it, and
softmax attention reads keys and values of the whole row. Documents may be cut anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import lcm

SEGMENTS_PER_RANK = 2


@dataclass(frozen=True)
class Piece:
    """The part of a document that lies in one segment."""

    start: int
    """First token, counted in the row."""
    stop: int
    document_start: int
    """Where the document begins; before `start` if the piece continues it."""

    @property
    def length(self) -> int:
        """Tokens of the piece."""
        return self.stop - self.start


@dataclass(frozen=True)
class ContextRow:
    """A packed row as one context-parallel rank sees it. Segments are counted in row order."""

    segments: tuple[tuple[int, int], ...]
    """[2 cp] first token and end of every segment."""
    own: tuple[int, ...]
    """Segments of this rank, in the order in which it holds them."""
    pieces: tuple[tuple[Piece, ...], ...]
    """Per own segment its pieces of documents, in order."""
    distances: tuple[tuple[int | None, ...], ...]
    """[i][j] tokens from the end of segment i to the start of segment j > i if one document
    reaches from one to the other, else None: what decays the state that i leaves to j."""

    @property
    def by_rank(self) -> tuple[int, ...]:
        """Segments in the order of ranks, and on each rank in the order in which it holds them."""
        cp = len(self.segments) // SEGMENTS_PER_RANK
        return tuple(segment for rank in range(cp) for segment in own_segments(cp, rank))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each own piece, in order; they sum to the tokens of this rank."""
        return tuple(piece.length for pieces in self.pieces for piece in pieces)


def own_segments(cp: int, rank: int) -> tuple[int, ...]:
    """Return the segments that a context-parallel rank holds, in order."""
    return (0,) if cp == 1 else (rank, 2 * cp - 1 - rank)


def segment_bounds(num_tokens: int, cp: int) -> tuple[tuple[int, int], ...]:
    """Return first token and end of every segment of a row; one segment without parallelism."""
    count = 1 if cp == 1 else SEGMENTS_PER_RANK * cp
    assert num_tokens % count == 0, "the plan checks it"
    size = num_tokens // count
    return tuple((i * size, (i + 1) * size) for i in range(count))


def own_tokens(num_tokens: int, cp: int, rank: int) -> tuple[tuple[int, int], ...]:
    """Return the ranges of the row that a rank holds, in order."""
    bounds = segment_bounds(num_tokens, cp)
    return tuple(bounds[segment] for segment in own_segments(cp, rank))


def make_context_row(boundaries: list[int], cp: int, rank: int) -> ContextRow:
    """Return what a rank holds of a row, cp > 1.

    Args:
        boundaries: 0, then the end of every document; the last is the number of tokens.
        cp: context-parallel degree.
        rank: context-parallel rank.
    """
    segments = segment_bounds(boundaries[-1], cp)
    documents = list(pairwise(boundaries))
    own = own_segments(cp, rank)
    return ContextRow(
        segments=segments,
        own=own,
        pieces=tuple(_pieces(documents, *segments[segment]) for segment in own),
        distances=_distances(documents, segments),
    )


def _pieces(documents: list[tuple[int, int]], first: int, end: int) -> tuple[Piece, ...]:
    return tuple(
        Piece(max(start, first), min(stop, end), start)
        for start, stop in documents
        if start < end and stop > first
    )


def _distances(
    documents: list[tuple[int, int]], segments: tuple[tuple[int, int], ...]
) -> tuple[tuple[int | None, ...], ...]:
    ends = [next(stop for start, stop in documents if start < end <= stop) for _, end in segments]
    return tuple(
        tuple(
            start - segments[i][1] if j > i and ends[i] > start else None
            for j, (start, _) in enumerate(segments)
        )
        for i in range(len(segments))
    )


def row_unit(cp: int, tp: int) -> int:
    """Return what the tokens of a row must be a multiple of; tp: of sequence parallelism."""
    return tp if cp == 1 else lcm(SEGMENTS_PER_RANK * cp, cp * tp)


def context_problems(key: str, tokens: int, cp: int, tp: int) -> list[str]:
    """Return why a row cannot be divided among context- and sequence-parallel ranks.

    Args:
        key: what the tokens are, as the person wrote it, with their number.
        tokens: tokens of one packed row.
        cp: context-parallel degree.
        tp: degree of sequence parallelism, 1 without it.
    """
    unit = row_unit(cp, tp)
    if tokens % unit == 0:
        return []
    sharers = [f"parallel.tensor_model_parallel_size={tp}, which sequence_parallel needs"] * (
        tp > 1
    )
    if cp > 1:
        sharers.insert(0, f"2 * parallel.context_parallel_size={cp}, two segments a rank")
    relation = "is too short for" if tokens < unit else "is not divisible by"
    return [
        f"{key} {relation} {' and by '.join(sharers)}; choose seq_length a multiple of {unit}, or "
        "micro_batch_size so that their product is one"
    ]
