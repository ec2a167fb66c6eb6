"""Generated arithmetic: format, correctness, splits."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.math_problems import (
    generate_problems,
    is_correct,
    is_held_out,
    parse_math_line,
    problem_key,
    solve_problem,
)

WORKED = (
    r"Compute 29 + 21 - 7. 9+1=10+0=10;2+2=04+1=05;0+0=00+0=00; "
    r"0-7=13-0=13;5-0=05-1=04;0-0=00-0=00; \boxed{43}"
)


def test_the_worked_example_is_generated() -> None:
    assert solve_problem((29, 21, 7), ("+", "-")).line() == WORKED


def test_generated_lines_parse_and_are_correct() -> None:
    for problem in itertools.islice(generate_problems(seed=3), 500):
        assert parse_math_line(problem.line() + "\n") == problem
        assert is_correct(problem)


@given(st.tuples(*[st.integers(0, 99)] * 3), st.tuples(*[st.sampled_from("+-")] * 2))
def test_the_rows_of_a_chain_follow_from_each_other(
    operands: tuple[int, ...], signs: tuple[str, ...]
) -> None:
    first = operands[0] + (operands[1] if signs[0] == "+" else -operands[1])
    last = first + (operands[2] if signs[1] == "+" else -operands[2])
    if min(first, last) < 0:
        return
    problem = solve_problem(operands, signs)
    results = []
    for table, sign in zip(problem.chain.split(" "), signs, strict=True):
        carry, digits = 0, ""
        for row in table.removesuffix(";").split(";"):
            given_digits, middle, end = row.split("=")
            x, y = int(given_digits[0]), int(given_digits[2])
            step = 1 if sign == "+" else -1
            assert x + step * y == step * int(middle[0]) * 10 + int(middle[1])
            assert int(middle[3]) == carry
            total = x + step * (y + carry)
            carry = int(end[0])
            assert total == step * carry * 10 + int(end[1])
            digits = end[1] + digits
        results.append(int(digits))
    assert results == [first, last]
    assert problem.answer == last


@pytest.mark.parametrize(
    "line",
    [
        "",
        WORKED + " ",
        " " + WORKED,
        WORKED + "\n\n",
        WORKED.replace("29", "029"),
        WORKED.replace("29 ", "129 "),
        WORKED.replace("Compute", "compute"),
        WORKED.replace("9+1=10+0=10;", ""),
        WORKED.replace("9+1=10+0=10;", "9+1=10+0=1;"),
        WORKED.replace("9+1=10+0=10;", "9+1=10-0=10;"),
        WORKED.replace(" - 7", ""),
        WORKED.replace("{43}", "{}"),
        WORKED.replace("{43}", "{-43}"),
        WORKED.replace("29", "2\u0669"),
    ],
)
def test_a_line_of_another_format_does_not_parse(line: str) -> None:
    assert parse_math_line(line) is None


def test_a_wrong_answer_parses_and_is_not_correct() -> None:
    problem = parse_math_line(WORKED.replace("{43}", "{44}"))
    assert problem is not None
    assert not is_correct(problem)


def test_reordered_terms_share_key_and_split() -> None:
    problems = [solve_problem((a, b, 7), ("+", "-")) for a, b in ((29, 21), (21, 29))]
    problems.append(solve_problem((29, 7, 21), ("-", "+")))
    assert len({problem_key(problem) for problem in problems}) == 1
    assert len({is_held_out(problem, fraction=0.5) for problem in problems}) == 1
    assert problem_key(problems[0]) != problem_key(solve_problem((29, 21, 7), ("+", "+")))


def test_no_problem_is_generated_twice_and_the_held_out_fraction_is_kept() -> None:
    problems = list(itertools.islice(generate_problems(seed=0), 4000))
    assert len({problem_key(problem) for problem in problems}) == 4000
    assert 0.08 < sum(is_held_out(problem, fraction=0.1) for problem in problems) / 4000 < 0.12


def test_a_table_of_another_sign_parses_and_is_wrong() -> None:
    problem = parse_math_line(WORKED.replace("21 - 7", "21 + 7").replace("{43}", "{57}"))
    assert problem is not None
    assert problem.answer == problem.value()
    assert not is_correct(problem)
