"""Random schedules of faults, and what is promised of a run that meets them.

- Signals, kills, crashes, hangs, failing and slow disks, torn files, slow ranks, NaN or a spike
  that does not come again: weights, moments and every record equal, byte for byte, those of the run
  that nothing disturbed.
- NaN or a spike that comes again: the same of the undisturbed run that was told to pass over
  (`resilience.skip_steps`) what the journal says was passed over.
- Going on with fewer ranks: the same rows at the same steps, losses within LAYOUT_TOLERANCE.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

NUM_STEPS = 8
LAYOUT_TOLERANCE = 1e-4
"""Of losses near 5 in fp32: sums run in another order under another layout, as in tests/e2e."""
BASE = [
    *("checkpoint.interval_steps=2", "checkpoint.keep=3", "logging.tensorboard=false"),
    *("resilience=unattended", "resilience.spike_sigma=100", "resilience.spike_window_steps=6"),
    *("resilience.hang_timeout_s=8", "resilience.hang_grace_s=1", "resilience.io_patience_s=60"),
    "resilience.max_skipped_in_a_row=2",
]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "dp2": (2, ["parallel.use_distributed_optimizer=true"]),
    "ep2": (2, ["parallel=ep2"]),
    "tp2": (2, ["parallel=tp2"]),
    "pp2": (2, ["parallel=pp2"]),
}
"""Ranks and words; two or four micro batches a step."""
PHASES = ("data", "forward", "optimizer", "update", "log", "save")
DEADLY = ("kill", "sigterm", "sigusr1", "crash")
MILD = ("nan", "nan times=2", "spike times=2", "disk_full times=2", "io_error", "slow_disk", "slow")
FIRST_JUDGED_STEP = 5
"""A spike before it is none: too few steps were accepted to compare it with, and one may be bad."""
AGAIN = ("nan times=2", "spike times=2")
"""Of MILD: they come again when the step is computed again."""


@dataclass(frozen=True)
class Schedule:
    """What one run meets."""

    seed: int
    layout: str
    faults: tuple[str, ...]
    """Words of `resilience.faults`."""
    outside: dict[int, float]
    """{start of the run: seconds after which all ranks get SIGTERM}"""
    fewer_from: int | None
    """From this start on there is one rank; None = always as many."""
    cold: int | None
    """This start has processes of its own; None = all are forks."""

    @property
    def comes_again(self) -> bool:
        """Whether a bad step is bad again, so that its data is passed over."""
        return any(f"kind={kind}" in fault for fault in self.faults for kind in AGAIN)

    def words(self) -> list[str]:
        """Return the words that inject the faults."""
        return [f"resilience.faults={list(self.faults)}"]

    def __str__(self) -> str:
        """Return everything that one must know to repeat it: CHAOS_SEEDS=[seed]."""
        outside = "".join(f"; SIGTERM {s:.1f} s into start {n}" for n, s in self.outside.items())
        fewer = f"; one rank from start {self.fewer_from}" if self.fewer_from else ""
        cold = f"; start {self.cold} cold" if self.cold else ""
        return f"seed {self.seed}, {self.layout}: {', '.join(self.faults)}{outside}{fewer}{cold}"


def make_schedule(seed: int, *, cold: bool = False) -> Schedule:
    """Return the schedule of a seed: 1 to 4 faults, of which each deadly one has its own start.

    Args:
        seed: decides everything.
        cold: the start after the first deadly fault is one of new processes.
    """
    draw = random.Random(seed)
    layout = draw.choice(list(LAYOUTS))
    num_deadly = draw.choice((1, 1, 1, 2, 2, 3))
    steps = sorted(draw.sample(range(1, NUM_STEPS + 1), num_deadly))
    faults = [_deadly(draw, attempt, step) for attempt, step in enumerate(steps, 1)]
    if draw.random() < 0.15:
        faults.append(f"kind=torn phase=start rank=0 attempt={num_deadly + 1}")
    for _ in range(min(draw.choice((0, 1, 1, 2)), 4 - len(faults))):
        faults.append(_mild(draw))
    fewer = layout in ("dp2", "ep2") and draw.random() < 0.15
    outside = {num_deadly + 1: draw.uniform(0.2, 6.0)} if draw.random() < 0.2 else {}
    return Schedule(
        seed=seed,
        layout=layout,
        faults=tuple(faults),
        outside=outside,
        fewer_from=2 if fewer and not any(kind in f for f in faults for kind in AGAIN) else None,
        cold=2 if cold else None,
    )


def _deadly(draw: random.Random, attempt: int, step: int) -> str:
    """Return a fault that ends a start of the run."""
    if draw.random() < 0.06:
        return f"kind=hang phase=forward step={step} rank={draw.randrange(2)} attempt={attempt}"
    kind, phase = draw.choice(DEADLY), draw.choice((*PHASES, "start", "validate", "stop"))
    words = [f"kind={kind}", f"phase={phase}", f"attempt={attempt}"]
    if phase == "start":
        step = 1
    elif phase == "validate":
        step = draw.choice((4, 8))
    elif phase == "stop":
        step = NUM_STEPS
    elif phase == "save":
        step += step % 2
    if phase == "forward":
        words.append(f"call={draw.choice((1, 2))}")
    words.append(f"step={step}")
    if phase in ("save", "forward", "stop") and kind != "crash" and draw.random() < 0.6:
        words.append(f"after_s={draw.uniform(0.01, 0.4):.2f}")
    if draw.random() < 0.7:
        words.append(f"rank={draw.randrange(2)}")
    return " ".join(words)


def _mild(draw: random.Random) -> str:
    """Return a fault that a run lives through, whenever it comes to that step."""
    kind, step = draw.choice(MILD), draw.randint(1, NUM_STEPS)
    if kind.startswith("spike"):
        step = max(step, FIRST_JUDGED_STEP)
    after = f" after_s={draw.uniform(0.1, 0.8):.1f}" if kind.startswith("slow") else ""
    return f"kind={kind} step={step} rank={draw.randrange(2)} attempt=0{after}"


def seeds(count: int, given: str | None) -> Sequence[int]:
    """Return the seeds to run: those that are given, "3,14", or the first `count`."""
    return [int(seed) for seed in given.split(",")] if given else range(1, count + 1)
