"""Faults on purpose, at exactly said moments: what the chaos suite throws at a run.

A fault is a few words in one string of `resilience.faults`, for example

    kind=kill phase=forward step=3 rank=1
    kind=disk_full step=4 times=2
    kind=sigterm phase=save step=6 rank=0 after_s=0.05 attempt=2

| kind | what happens on that rank |
|---|---|
| kill, sigterm, sigusr1 | the process gets that signal |
| crash | an exception that nothing handles |
| hang | the main thread sleeps for ever |
| slow | it sleeps `after_s` |
| nan, spike | its gradients of the step are NaN, or 1000 times too large, `times` times |
| disk_full, io_error | the next `times` files of a checkpoint cannot be written |
| slow_disk | they take `after_s` longer each |
| torn | the newest checkpoint loses the end of a file, the records get half a line |
"""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ring_train.config.keys import nearest
from ring_train.errors import UserError
from ring_train.resilience.journal import JOURNAL_FILE, Journal
from ring_train.storage import files

PHASES = (
    *("start", "data", "forward", "optimizer", "update", "log", "validate", "save", "stop"),
    "roll_back",
)
SIGNALS = {"kill": "SIGKILL", "sigterm": "SIGTERM", "sigusr1": "SIGUSR1"}
DISK = {"disk_full": errno.ENOSPC, "io_error": errno.EIO, "slow_disk": 0}
GRADIENTS = {"nan": math.nan, "spike": 1000.0}
KINDS = (*SIGNALS, "crash", "hang", "slow", *GRADIENTS, *DISK, "torn")
DEFAULT_PHASES = dict.fromkeys(GRADIENTS, "optimizer") | dict.fromkeys(DISK, "data")
TORN_LINE = '{"step": 99999'


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault; see the table above."""

    kind: str
    phase: str
    step: int = 1
    """Number of the step, as in metrics.jsonl; phase start has none."""
    rank: int | None = None
    """Global; None = all."""
    attempt: int | None = 1
    """In this start of the run only; 0 = in every one."""
    times: int = 1
    after_s: float = 0.0
    call: int = 1
    """The how-manieth time that the phase begins in this step: micro batches count."""


class InjectedCrash(RuntimeError):
    """The exception of kind=crash."""


def parse_fault(text: str) -> Fault:
    """Return the fault of one string.

    Raises:
        UserError: a word that does not exist, or no kind.
    """
    types = {"kind": str, "phase": str, "after_s": float}
    known = [field.name for field in fields(Fault)]
    values: dict[str, Any] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in known:
            raise _wrong(text, f"{name} is no word of a fault{nearest(name, known)}")
        try:
            values[name] = types.get(name, int)(value)
        except ValueError:
            raise _wrong(text, f"{word} is no number") from None
    values.setdefault("phase", DEFAULT_PHASES.get(values.get("kind", ""), "forward"))
    for name, choices in (("kind", KINDS), ("phase", PHASES)):
        if values.get(name) not in choices:
            raise _wrong(text, f"{name}={values.get(name)}; choose from {', '.join(choices)}")
    return Fault(**values)


def _wrong(text: str, relation: str) -> UserError:
    return UserError(f"resilience.faults={text!r}: {relation}; see ring_train/resilience/faults.py")


class FaultInjector:
    """The faults of one rank in one start of a run.

    Args:
        faults: all of the run.
        run_dir: for kind=torn.
        journal: receives `fault` before it strikes; says rank and attempt.
    """

    def __init__(self, faults: list[Fault], run_dir: Path, journal: Journal) -> None:
        self.run_dir, self.journal = run_dir, journal
        rank, attempt = journal.rank, journal.attempt
        self.faults = [
            fault
            for fault in faults
            if fault.rank in (None, rank) and fault.attempt in (0, attempt)
        ]
        self._calls: dict[tuple[str, int], int] = {}
        self._gradients: dict[Fault, int] = {}

    def strike(self, phase: str, step: int) -> None:
        """Do what is due as a phase of a step begins; phase start counts as step 1."""
        if not self.faults:
            return
        call = self._calls[phase, step] = self._calls.get((phase, step), 0) + 1
        for fault in self.faults:
            if (fault.phase, fault.step, fault.call) == (phase, step, call):
                self._strike(fault)

    def gradient_factor(self, step: int) -> float | None:
        """Return what the gradients of a step are to be multiplied by now, None for nothing."""
        for fault in self.faults:
            if fault.kind in GRADIENTS and fault.step == step:
                done = self._gradients.get(fault, 0)
                if done < fault.times:
                    self._gradients[fault] = done + 1
                    self._tell(fault)
                    return GRADIENTS[fault.kind]
        return None

    def _tell(self, fault: Fault) -> None:
        self.journal.write("fault", step=fault.step, kind=fault.kind, phase=fault.phase)

    def _strike(self, fault: Fault) -> None:
        if fault.kind in GRADIENTS:
            return
        self._tell(fault)
        if fault.kind in SIGNALS:
            _send(signal.Signals[SIGNALS[fault.kind]], fault.after_s)
        elif fault.kind in DISK:
            files.before_writing.append(_FailingDisk(fault))
        elif fault.kind == "torn":
            _tear(self.run_dir)
        elif fault.kind == "crash":
            raise InjectedCrash(f"{fault}")
        elif fault.kind == "slow":
            time.sleep(fault.after_s)
        else:
            threading.Event().wait()


def _send(number: signal.Signals, after_s: float) -> None:
    """Send this process a signal, now or in a while."""
    if after_s:
        timer = threading.Timer(after_s, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
    else:
        os.kill(os.getpid(), number)


class _FailingDisk:
    """Called before each file of a checkpoint is written."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.left = fault, fault.times

    def __call__(self, path: Path) -> None:
        if self.left == 0:
            return
        self.left -= 1
        if self.fault.kind == "slow_disk":
            time.sleep(self.fault.after_s)
        else:
            code = DISK[self.fault.kind]
            raise OSError(code, os.strerror(code), str(path))


def _tear(run_dir: Path) -> None:
    """Do what a failing disk does to the files of a run."""
    for name in ("metrics.jsonl", JOURNAL_FILE):
        if (run_dir / name).exists():
            with (run_dir / name).open("a") as file:
                file.write(TORN_LINE + "\n")
    newest = sorted(run_dir.glob("checkpoints/step_????????"))[-1:]
    for path in (path for folder in newest for path in folder.glob("rank_00000.safetensors")):
        os.truncate(path, path.stat().st_size // 2)
