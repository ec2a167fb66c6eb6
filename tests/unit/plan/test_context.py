"""Every token lies on one rank, and segments know what one leaves to another."""

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_train.plan import PlanError
from ring_train.plan.context import (
    context_problems,
    make_context_row,
    own_tokens,
    row_unit,
    segment_bounds,
)


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[int], int]:
    """Return (boundaries, cp) of a row cut at random places."""
    cp = draw(st.integers(2, 5))
    tokens = 2 * cp * draw(st.integers(1, 9))
    cuts = draw(st.sets(st.integers(1, tokens - 1), max_size=8)) if tokens > 1 else set()
    return [0, *sorted(cuts), tokens], cp


@given(rows())
def test_ranks_hold_every_token_once_and_equally_many(row: tuple[list[int], int]) -> None:
    boundaries, cp = row
    held = [
        [
            token
            for start, stop in own_tokens(boundaries[-1], cp, rank)
            for token in range(start, stop)
        ]
        for rank in range(cp)
    ]
    assert sorted(token for tokens in held for token in tokens) == list(range(boundaries[-1]))
    assert {len(tokens) for tokens in held} == {boundaries[-1] // cp}


@given(rows())
def test_every_rank_meets_the_same_number_of_causal_pairs(row: tuple[list[int], int]) -> None:
    """Of a row that is one document: what zigzag is for."""
    boundaries, cp = row
    pairs = {
        sum(token + 1 for span in own_tokens(boundaries[-1], cp, rank) for token in range(*span))
        for rank in range(cp)
    }
    assert len(pairs) == 1


@given(rows())
def test_pieces_are_the_documents_of_the_tokens(row: tuple[list[int], int]) -> None:
    boundaries, cp = row
    starts = [start for start, stop in pairwise(boundaries) for _ in range(start, stop)]
    for rank in range(cp):
        context = make_context_row(boundaries, cp, rank)
        for segment, pieces in zip(context.own, context.pieces, strict=True):
            first, end = context.segments[segment]
            tokens = [t for piece in pieces for t in range(piece.start, piece.stop)]
            assert tokens == list(range(first, end))
            for piece in pieces:
                found = {starts[t] for t in range(piece.start, piece.stop)}
                assert found == {piece.document_start}
        assert sum(context.lengths) == boundaries[-1] // cp


@given(rows())
def test_distances_join_the_segments_that_one_document_reaches(row: tuple[list[int], int]) -> None:
    boundaries, cp = row
    starts = [start for start, stop in pairwise(boundaries) for _ in range(start, stop)]
    segments = segment_bounds(boundaries[-1], cp)
    distances = make_context_row(boundaries, cp, 0).distances
    for i, (_, end) in enumerate(segments):
        for j, (start, _) in enumerate(segments):
            joined = j > i and starts[end - 1] == starts[start]
            assert distances[i][j] == (start - end if joined else None)


def test_the_order_of_ranks_is_the_order_in_which_they_hold_segments() -> None:
    assert make_context_row([0, 12], 3, 1).by_rank == (0, 5, 1, 4, 2, 3)
    assert make_context_row([0, 12], 3, 1).own == (1, 4)
    assert own_tokens(12, 3, 1) == ((2, 4), (8, 10))
    assert own_tokens(5, 1, 0) == ((0, 5),)


@pytest.mark.parametrize(
    ("tokens", "cp", "tp", "message"),
    [
        (6, 4, 1, "is too short for 2 \\* parallel.context_parallel_size=4"),
        (20, 4, 1, "is not divisible by 2 \\* parallel.context_parallel_size=4.*multiple of 8"),
        (16, 2, 16, "and by parallel.tensor_model_parallel_size=16.*multiple of 32"),
        (15, 1, 2, "is not divisible by parallel.tensor_model_parallel_size=2.*multiple of 2"),
    ],
)
def test_a_row_that_does_not_divide_is_refused(tokens: int, cp: int, tp: int, message: str) -> None:
    problems = context_problems(f"train.seq_length={tokens}", tokens, cp, tp)
    assert len(problems) == 1
    with pytest.raises(PlanError, match=message):
        raise PlanError(problems)
    assert context_problems("train.seq_length=n", row_unit(cp, tp), cp, tp) == []


def test_lengths_are_consistent_with_boundaries() -> None:
    row = make_context_row([0, 3, 4, 16], 2, 1)
    assert list(accumulate(row.lengths)) == [4, 8]
    assert row.pieces[0][0].document_start == 4
