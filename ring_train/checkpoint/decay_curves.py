"""Weights of checkpoints whose average stands for a decay of the learning rate (WSM).

With Delta_i the change from checkpoint i - 1 to i and 1 >= w_1 >= ... >= w_k >= 0,

    theta_0 + sum_i w_i Delta_i = sum_j c_j theta_j,   c_j = w_j - w_{j+1}, w_0 = 1, w_{k+1} = 0

so c sums to 1, and is what updates scaled by w would have led to if the gradients were those of the
constant rate. Source: arXiv 2507.17634.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from ring_train.config import DecayCurve

CURVES: dict[DecayCurve, Callable[[float], float]] = {
    DecayCurve.linear: lambda x: 1 - x,
    DecayCurve.cosine: lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    DecayCurve.one_minus_sqrt: lambda x: 1 - math.sqrt(x),
    DecayCurve.constant: lambda x: 1.0,
}
"""Non-increasing, 1 at 0."""


def update_weights(curve: DecayCurve, steps: Sequence[int]) -> list[float]:
    """Return w_j, the factor on what happened between checkpoint j - 1 and j; w_0 = 1.

    The curve would reach its end one mean distance after the last checkpoint, so that each
    checkpoint counts: at equal distances w_j is the curve at j / n. Distances may differ; a factor
    is the curve at the end of its stretch.

    Args:
        curve: shape of the decay.
        steps: of n >= 2 checkpoints, ascending.
    """
    num_checkpoints = len(steps)
    span = (steps[-1] - steps[0]) * num_checkpoints / (num_checkpoints - 1)
    return [CURVES[curve]((step - steps[0]) / span) for step in steps]


def checkpoint_weights(curve: DecayCurve, steps: Sequence[int]) -> list[float]:
    """Return c_j, the weight of each checkpoint in the average; see `update_weights`."""
    updates = [*update_weights(curve, steps), 0.0]
    return [this - following for this, following in itertools.pairwise(updates)]
