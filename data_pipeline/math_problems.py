r"""Generated arithmetic with worked chains: the `math` domain, its strict parser and its checker.

A problem is one line whose answer can be checked:

    Compute 29 + 21 - 7. 9+1=10+0=10;2+2=04+1=05;0+0=00+0=00; 0-7=13-0=13;... \boxed{43}

One table per operation, three rows per table, units first. A row `x+y=sd+i=cd;` adds two digits
(carry s, digit d), then the carry i of the row before it; c and d are the carry and digit that
result. In a row `x-y=bd-i=cd;` b, i and c are borrows. Operands have at most two digits and no
intermediate result is negative, so three digits always suffice.
"""

import dataclasses
import hashlib
import random
import re
from collections.abc import Callable, Iterator

Expression = tuple[tuple[int, ...], tuple[str, ...]]
"""Operands, and `+` or `-` before every one but the first."""

NUM_ROWS = 3
"""Rows of a table: units, tens, hundreds."""

_ROWS = rf"(?:\d\+\d=\d\d\+\d=\d\d;){{{NUM_ROWS}}}|(?:\d-\d=\d\d-\d=\d\d;){{{NUM_ROWS}}}"
_OPERAND = r"(?:0|[1-9]\d?)"
_LINE = re.compile(
    rf"Compute (?P<prompt>{_OPERAND}(?: [+-] {_OPERAND}){{1,2}})\. "
    rf"(?P<chain>(?:{_ROWS})(?: (?:{_ROWS})){{0,1}}) "
    r"\\boxed\{(?P<answer>0|[1-9]\d{0,2})\}",
    re.ASCII,
)


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """A sum of two or three signed operands with the chain and the answer somebody gave."""

    operands: tuple[int, ...]
    signs: tuple[str, ...]
    """`+` or `-` before every operand but the first."""
    chain: str
    """Digit tables, separated by one space."""
    answer: int

    def value(self) -> int:
        """Return the true result."""
        return _partial_results(self.operands, self.signs)[-1]

    def line(self) -> str:
        """Return the problem in the generated format, without a newline."""
        prompt = str(self.operands[0]) + "".join(
            f" {sign} {operand}"
            for sign, operand in zip(self.signs, self.operands[1:], strict=True)
        )
        return f"Compute {prompt}. {self.chain} \\boxed{{{self.answer}}}"


def solve_problem(operands: tuple[int, ...], signs: tuple[str, ...]) -> Problem:
    """Return the problem with its worked chain and right answer."""
    partial = _partial_results(operands, signs)
    tables = (
        _table(a, sign, b) for a, sign, b in zip(partial[:-1], signs, operands[1:], strict=True)
    )
    return Problem(operands, signs, " ".join(tables), partial[-1])


def parse_math_line(line: str) -> Problem | None:
    """Return the problem a line states if it has the generated format exactly, else None.

    The format is the grammar above and one table per operation. Signs and digits of the tables and
    the answer may be wrong: `is_correct` judges those. A trailing newline is allowed.
    """
    match = _LINE.fullmatch(line.removesuffix("\n"))
    if match is None:
        return None
    words = match["prompt"].split(" ")
    signs = tuple(words[1::2])
    if len(match["chain"].split(" ")) != len(signs):
        return None
    operands = tuple(int(word) for word in words[0::2])
    return Problem(operands, signs, match["chain"], int(match["answer"]))


def is_correct(problem: Problem) -> bool:
    """Return whether the tables have the signs of the problem and the answer is the true result."""
    table_signs = tuple(table[1] for table in problem.chain.split(" "))
    return table_signs == problem.signs and problem.answer == problem.value()


def problem_key(problem: Problem) -> str:
    """Return a key equal for problems that differ only in the order of their terms."""
    terms = zip(("+", *problem.signs), problem.operands, strict=True)
    return " ".join(sorted(f"{sign}{operand}" for sign, operand in terms))


def is_held_out(problem: Problem, *, fraction: float) -> bool:
    """Return whether a problem belongs to the held-out split; all reorderings agree."""
    digest = hashlib.sha256(problem_key(problem).encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def generate_problems(seed: int) -> Iterator[Problem]:
    """Yield solved problems without end, no two of them reorderings of each other.

    One in ten has two operands, the others three; operands are uniform in 1 to 99.
    """
    rng = random.Random(seed)

    def draw() -> Expression:
        num_operands = 2 if rng.random() < 0.1 else 3
        operands = tuple(rng.randint(1, 99) for _ in range(num_operands))
        return operands, tuple(rng.choice("+-") for _ in range(num_operands - 1))

    return distinct_problems(draw)


def distinct_problems(draw: Callable[[], Expression]) -> Iterator[Problem]:
    """Yield solved problems of drawn expressions, no two of them reorderings of each other.

    Expressions with a negative partial result are left out.
    """
    seen: set[str] = set()
    while True:
        operands, signs = draw()
        if min(_partial_results(operands, signs)) < 0:
            continue
        problem = solve_problem(operands, signs)
        key = problem_key(problem)
        if key not in seen:
            seen.add(key)
            yield problem


def _partial_results(operands: tuple[int, ...], signs: tuple[str, ...]) -> list[int]:
    results = [operands[0]]
    for sign, operand in zip(signs, operands[1:], strict=True):
        results.append(results[-1] + operand if sign == "+" else results[-1] - operand)
    return results


def _table(a: int, sign: str, b: int) -> str:
    rows = []
    carry = 0
    for _ in range(NUM_ROWS):
        (a, x), (b, y) = divmod(a, 10), divmod(b, 10)
        first = abs((x + y if sign == "+" else x - y) // 10), (x + y if sign == "+" else x - y) % 10
        total = x + y + carry if sign == "+" else x - y - carry
        rows.append(f"{x}{sign}{y}={first[0]}{first[1]}{sign}{carry}=")
        carry = abs(total // 10)
        rows.append(f"{carry}{total % 10};")
    return "".join(rows)
