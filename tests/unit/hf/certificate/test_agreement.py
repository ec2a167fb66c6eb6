import math

import pytest

from ring_train.hf.certificate.agreement import Tie, compare_scores, scores_check

WANTED = [[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0]]
CLEAR = [None, None]


def test_scores_differ_by_position_and_never_pass_as_nan() -> None:
    right = compare_scores("x", WANTED, WANTED, CLEAR)
    assert (right.differences, right.largest, right.num_compared) == ([], 0.0, 6)
    found = compare_scores("x", [[-1.0, -2.5, -3.0, -4.0], WANTED[1]], WANTED, CLEAR)
    assert found.largest == 0.5
    assert found.differences == [
        "x, row 0 of 5 tokens: 1 log-probabilities differ, most at token 2: -2.500000, "
        "not -2.000000"
    ]
    early = [Tie(token=0, margin=0.0)] * 2
    for wrong in (math.nan, -math.inf):
        for ties in (CLEAR, early):
            found = compare_scores("x", [[-1.0, wrong, -3.0, -4.0], WANTED[1]], WANTED, ties)
            assert found.differences
            assert found.largest == math.inf
    for ties in (CLEAR, early):
        assert compare_scores("x", [[-1.0], WANTED[1]], WANTED, ties).largest == math.inf
        assert compare_scores("x", [], WANTED, ties).largest == math.inf


@pytest.mark.parametrize(("wrong", "is_excused"), [(1, False), (2, True), (3, True)])
def test_a_row_ends_at_a_tie_and_not_before_it(wrong: int, is_excused: bool) -> None:
    row = list(WANTED[0])
    row[wrong] -= 0.05
    ties = [Tie(token=2, margin=3e-8), None]
    found = compare_scores("x", [row, WANTED[1]], WANTED, ties)
    assert (found.differences == []) == is_excused
    check = scores_check("x", found)
    assert check.status == ("passed" if is_excused else "failed")
    if is_excused:
        words = "4 of 6 log-probabilities; 1 rows end at a routing tie"
        assert check.figures["compared"] == words
        assert check.figures["ties"] == ["x, row 0 ends at token 2: margin 3.0e-08"]
    assert (
        scores_check("x", compare_scores("x", [row, WANTED[1]], WANTED, CLEAR)).status == "failed"
    )


def test_what_agrees_behind_a_tie_is_compared() -> None:
    found = compare_scores("x", WANTED, WANTED, [Tie(token=0, margin=0.0)] * 2)
    assert (found.num_compared, found.ends) == (6, [])


def test_too_few_comparisons_are_none() -> None:
    wrong = [[value - 1 for value in row] for row in WANTED]
    found = compare_scores("x", wrong, WANTED, [Tie(token=0, margin=0.0)] * 2)
    check = scores_check("x", found)
    assert (check.status, check.is_open) == ("not run", True)
    assert check.not_run is not None
    assert "routing ties leave 0 of 6 log-probabilities" in check.not_run
