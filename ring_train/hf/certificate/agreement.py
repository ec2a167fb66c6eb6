"""How near log-probabilities come to the trainer's, and where routing leaves them open.

A router whose best rejected expert (or group) scores within rounding of a chosen one may choose
either: two right implementations then give the token to different experts, and everything after it
in the row differs by far more than rounding. What differs from such a token on is left out of the
comparison, and counted; what agrees is compared, tie or not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from ring_train.hf.certificate.record import Check

Scores = Sequence[Sequence[float]]

TOLERANCE = 1e-4
"""Of a log-probability in fp32; two right implementations differ by about 1e-5."""
TIE_MARGIN = 1e-5
"""Of router scores (0 to 1): like log-probabilities they differ by up to about 1e-5 between right
implementations in fp32, so a smaller gap between chosen and rejected decides nothing."""
MIN_COMPARED_FRACTION = 0.5
"""Of the log-probabilities of a check: less is no comparison."""


@dataclass(frozen=True, kw_only=True)
class Tie:
    """The first token of a row whose routing is within rounding of another one."""

    token: int
    """0-based; log-probabilities from this place on depend on it."""
    margin: float


Ties = Sequence[Tie | None]
"""Of each row; None if its routing is clear to the end."""


@dataclass(kw_only=True)
class Agreement:
    """What a comparison of log-probabilities found."""

    differences: list[str] = field(default_factory=list)
    largest: float = 0.0
    """Of what was compared."""
    num_compared: int = 0
    num_logprobs: int = 0
    ends: list[str] = field(default_factory=list)
    """Rows that end at a tie: which, where, and how near it was."""


def compare_scores(
    name: str, found: Scores, wanted: Scores, ties: Ties, tolerance: float = TOLERANCE
) -> Agreement:
    """Return where log-probabilities differ by more than a tolerance.

    A line for each row, with its worst position; what is not a number differs without bound. A row
    that agrees before its tie and differs behind it ends there.
    """
    result = Agreement(num_logprobs=sum(map(len, wanted)))
    if len(found) != len(wanted):
        result.differences.append(f"{name}: {len(found)} rows, not {len(wanted)}")
        result.largest = math.inf
        return result
    for row, (got, true, tie) in enumerate(zip(found, wanted, ties, strict=True)):
        if len(got) != len(true):
            result.differences.append(f"{name}, row {row}: {len(got)} values, not {len(true)}")
            result.largest = math.inf
            continue
        apart = [_distance(one, other) for one, other in zip(got, true, strict=True)]
        behind = [] if tie is None else apart[tie.token :]
        # Another expert gives another number; NaN is never a matter of routing.
        if tie is not None and tolerance < max(behind, default=0.0) < math.inf:
            apart = apart[: tie.token]
            result.ends.append(
                f"{name}, row {row} ends at token {tie.token}: margin {tie.margin:.1e}"
            )
        result.num_compared += len(apart)
        if not apart:
            continue
        worst = max(range(len(apart)), key=apart.__getitem__)
        result.largest = max(result.largest, apart[worst])
        if apart[worst] > tolerance:
            count = sum(distance > tolerance for distance in apart)
            result.differences.append(
                f"{name}, row {row} of {len(true) + 1} tokens: {count} log-probabilities differ, "
                f"most at token {worst + 1}: {got[worst]:.6f}, not {true[worst]:.6f}"
            )
    return result


def _distance(one: float, other: float) -> float:
    apart = abs(one - other)
    return apart if math.isfinite(apart) else math.inf


def scores_check(name: str, *found: Agreement) -> Check:
    """Return the check of log-probabilities; one that compared too few of them was not run."""
    differences = [line for one in found for line in one.differences]
    ends = [line for one in found for line in one.ends]
    compared = sum(one.num_compared for one in found)
    every = sum(one.num_logprobs for one in found)
    figures: dict[str, object] = {"largest_difference": max(one.largest for one in found)}
    if ends:
        figures |= {
            "compared": f"{compared} of {every} log-probabilities; {len(ends)} rows end at a "
            "routing tie",
            "ties": ends,
        }
    if differences or compared >= MIN_COMPARED_FRACTION * every:
        return Check(name=name, differences=differences, figures=figures)
    reason = (
        f"routing ties leave {compared} of {every} log-probabilities; give other rows by "
        "prompts=FILE"
    )
    return Check(name=name, figures=figures, not_run=reason, is_open=True)
