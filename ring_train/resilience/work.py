"""Which trained steps count: those that no later start and no roll-back went back behind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

PRODUCTIVE = "productive"
REDONE = "redone"
SKIPPED = "skipped"


@dataclass
class Stretch:
    """Steps (first, last] that were trained in one go."""

    first: int
    last: int
    kept: int
    """Steps past this one were or will be trained again."""
    us: int = 0

    @property
    def steps(self) -> int:
        """How many they are."""
        return self.last - self.first

    def cut(self) -> int:
        """Take away what is past the kept steps; return its microseconds."""
        last = min(self.last, max(self.kept, self.first))
        lost = self.us * (self.last - last) // self.steps if self.steps else 0
        self.us, self.last = self.us - lost, last
        return lost


@dataclass
class Work:
    """Follows the steps of a run and gives their time to `productive`, `redone` or `skipped`.

    Every method returns how many microseconds each of them gains; a loss is negative.
    """

    step: int = 0
    """Steps done at the last record that says so."""
    done: list[Stretch] = field(default_factory=list)
    """All that counts so far."""
    pending: list[Stretch] = field(default_factory=list)
    """Trained since the last progress, cut at roll-backs; has no time yet."""
    bad_tries: int = 0
    """Since the last progress: computed, and thrown away."""
    passed_over: int = 0
    """Since the last progress: counted as a step, without an update."""

    def restart(self, step: int) -> Counter[str]:
        """Go on from a checkpoint, or from nothing; what was not recorded has no time."""
        self._clear()
        self.step = step
        return self._undo(self.done, step)

    def roll_back(self, from_step: int, to_step: int) -> Counter[str]:
        """Go back within an attempt."""
        self._reach(from_step)
        for stretch in self.pending:
            stretch.kept = min(stretch.kept, to_step)
        self.step = to_step
        return self._undo(self.done, to_step)

    def bad_step(self, decision: object) -> None:
        """Note a step that was bad."""
        if decision == "skip":
            self.passed_over += 1
        else:
            self.bad_tries += 1

    def progress(self, step: int, us: int) -> Counter[str]:
        """Share out the time of all that was trained since the last progress."""
        self._reach(step)
        steps = sum(stretch.steps for stretch in self.pending)
        tries = steps + self.bad_tries
        skipped = us * min(self.bad_tries + self.passed_over, tries) // max(tries, 1)
        if not steps:
            skipped = us if tries else 0
        gained = Counter({SKIPPED: skipped})
        left = us - skipped
        for stretch in self.pending:
            # The last one takes what rounding leaves.
            stretch.us = left * stretch.steps // max(steps, 1)
            left, steps = left - stretch.us, steps - stretch.steps
            gained[PRODUCTIVE] += stretch.us
            gained[REDONE] += (lost := stretch.cut())
            gained[PRODUCTIVE] -= lost
        gained[SKIPPED] += left
        self.done += [stretch for stretch in self.pending if stretch.steps]
        self._clear()
        return gained

    def _reach(self, step: int) -> None:
        if step > self.step:
            self.pending.append(Stretch(self.step, step, step))
        self.step = step

    def _undo(self, stretches: list[Stretch], step: int) -> Counter[str]:
        lost = 0
        for stretch in stretches:
            stretch.kept = min(stretch.kept, step)
            lost += stretch.cut()
        self.done = [stretch for stretch in stretches if stretch.steps]
        return Counter({PRODUCTIVE: -lost, REDONE: lost})

    def _clear(self) -> None:
        self.pending, self.bad_tries, self.passed_over = [], 0, 0
