"""PlanError and the few phrases that its messages share.

A problem is one line: path=value; the violated relation; the way out.
"""

from collections.abc import Iterable

from ring_train.errors import UserError


class PlanError(UserError):
    """A config that cannot be run; the message lists every problem, one a line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


def divisors(number: int, up_to: int = 1024) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    return [d for d in range(1, min(number, up_to) + 1) if number % d == 0]


def indivisible(key: str, value: int, by_key: str, by: int) -> list[str]:
    """Return the problem that `value` is not a multiple of `by`, or nothing."""
    if value % by == 0:
        return []
    name = by_key.rsplit(".", 1)[-1]
    return [
        (
            f"{key}={value} is not divisible by {by_key}={by}; "
            f"choose {name} from {_short(divisors(value))}, or another {key.rsplit('.', 1)[-1]}"
        )
    ]


def _short(numbers: list[int]) -> str:
    """Return up to eight numbers as text, the small ones."""
    shown = ", ".join(str(number) for number in numbers[:8])
    return shown if len(numbers) <= 8 else f"{shown}, ..."
