"""The end of the allotted time, early enough to save before it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping

from ring_train.errors import UserError

DEADLINE_VARIABLE = "RING_TRAIN_DEADLINE"
"""Unix seconds at which the job is killed; set by slurm/."""
SLACK = 1.5
"""A step or save may take so much longer than the longest so far."""


class Deadline:
    """When a run must stop so that its checkpoint is durable in time.

    Args:
        at: Unix seconds at which the job is killed; inf = never.
        margin_s: kept free besides what was measured.
    """

    def __init__(self, at: float, margin_s: float) -> None:
        self.at, self.margin_s = at, margin_s
        self._step_s = self._save_s = 0.0

    def note_step(self, seconds: float) -> None:
        """Note how long a step took, with the logging and validation that fell on it."""
        self._step_s = max(seconds, 0.9 * self._step_s)

    def note_save(self, seconds: float) -> None:
        """Note how long it took from the beginning of a save until it was durable."""
        self._save_s = max(self._save_s, seconds)

    @property
    def reserved_s(self) -> float:
        """Seconds before the end at which to stop: one more step, two saves, the margin.

        Two, because the save of an interval may be under way when the last one is begun.
        """
        return SLACK * (self._step_s + 2 * self._save_s) + self.margin_s

    def is_near(self) -> bool:
        """Return whether it is time to stop."""
        return time.time() + self.reserved_s >= self.at


def read_deadline(environment: Mapping[str, str] = os.environ) -> float:
    """Return the Unix seconds at which the launcher says the job is killed; inf if it does not.

    Raises:
        UserError: the variable is no time.
    """
    text = environment.get(DEADLINE_VARIABLE, "")
    if not text:
        return math.inf
    try:
        at = float(text)
    except ValueError:
        at = math.nan
    if not at > 0:
        raise UserError(
            f"{DEADLINE_VARIABLE}={text!r} is not a time in Unix seconds; unset it, or set it as "
            "slurm/common.sh does"
        )
    return at
