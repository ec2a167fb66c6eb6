"""What to do with a step: a pure function of figures that all ranks share.

The ladder: compute it again, then pass it over without an update, then roll back to a checkpoint
from before the trouble and pass over all of its data, then stop for a person. Each rung is bounded.
Spikes follow the rule of OLMo-core's `SkipStepOptimizer`: more than so many standard deviations
above the mean of the last accepted steps, in the loss or in the gradient norm.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum, auto

from ring_train.config import ResilienceConfig


class Cause(StrEnum):
    """What is wrong with a step."""

    nonfinite = auto()
    spike = auto()


class Decision(StrEnum):
    """What is done about it."""

    rerun = auto()
    skip = auto()
    roll_back = auto()
    stop = auto()


CODES: tuple[Cause | None, ...] = (None, Cause.spike, Cause.nonfinite)
"""Causes by their number in the agreement of ranks: the worst one counts."""

Figures = tuple[float, float]
"""(loss in nats, gradient norm) of a step."""


@dataclass(frozen=True)
class Troubles:
    """What went wrong before."""

    reruns: int = 0
    """Of this step."""
    in_a_row: int = 0
    """Steps just before that were passed over."""
    roll_backs: int = 0
    """Of the whole run."""


def judge(figures: Figures, recent: Sequence[Figures], config: ResilienceConfig) -> Cause | None:
    """Return what is wrong with a step, None if it is as it should be.

    Args:
        figures: of the step.
        recent: of the accepted steps before it, at most `spike_window_steps`, oldest first.
        config: thresholds.
    """
    if not all(map(math.isfinite, figures)):
        return Cause.nonfinite
    sigma, needed = config.spike_sigma, max(2, config.spike_window_steps // 2)
    if sigma is None or len(recent) < needed:
        return None
    columns = zip(*recent, strict=True)
    if any(
        _is_outlier(value, column, sigma) for value, column in zip(figures, columns, strict=True)
    ):
        return Cause.spike
    return None


def _is_outlier(value: float, before: Sequence[float], sigma: float) -> bool:
    return value - statistics.fmean(before) > sigma * statistics.stdev(before)


def decide(troubles: Troubles, config: ResilienceConfig) -> Decision:
    """Return what to do about a bad step."""
    if config.rerun_bad_steps and troubles.reruns == 0:
        return Decision.rerun
    if troubles.in_a_row < config.max_skipped_in_a_row:
        return Decision.skip
    if troubles.roll_backs < config.max_roll_backs:
        return Decision.roll_back
    return Decision.stop
