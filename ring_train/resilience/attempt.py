"""One start of a run, from the moment that its folder is ours until the process ends."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch.distributed as dist

from ring_train.checkpoint.folders import CHECKPOINTS, drop_after
from ring_train.checkpoint.ranks import from_rank_0
from ring_train.errors import UserError
from ring_train.plan import Plan
from ring_train.resilience.deadline import Deadline, read_deadline
from ring_train.resilience.faults import Fault, FaultInjector, parse_fault
from ring_train.resilience.journal import (
    JOURNAL_FILE,
    ROLL_BACK,
    ROLLED_BACK,
    Journal,
    next_attempt,
    read_journal,
    skipped_steps,
)
from ring_train.resilience.outcome import OUTCOME_FILE, Outcome, State, write_outcome
from ring_train.resilience.run_lock import RunLock, renewed_at
from ring_train.resilience.watchdog import Watchdog
from ring_train.runtime.distributed import Groups
from ring_train.runtime.signals import SIGNALS, StopRequested
from ring_train.storage.lines import PatientLines

logger = logging.getLogger(__name__)


@dataclass
class Attempt:
    """What one start of a run knows of the starts before it, and where it writes what happens."""

    plan: Plan
    rank: int
    journal: Journal
    lines: PatientLines
    """Through which the records of this rank are written."""
    faults: FaultInjector
    watchdog: Watchdog | None
    deadline: Deadline
    skipped: set[int]
    """Numbers of the steps that are passed over: by config, or decided before."""
    roll_backs: int
    """Of the run so far."""
    began: float = field(default_factory=time.monotonic)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.plan.config.run_dir)

    def at(self, phase: str, step: int) -> None:
        """Note on this rank that a phase of a step (numbered as in metrics.jsonl) begins."""
        if self.watchdog is not None:
            self.watchdog.beat(phase)
        self.faults.strike(phase, step)

    def tell(self, event: str, *, step: int | None = None, **fields: object) -> None:
        """Write an event that all ranks know to the journal, once."""
        if self.rank == 0:
            self.journal.write(event, step=step, **fields)

    def warn(self, message: str, *arguments: object) -> None:
        """Log a warning that all ranks would say, once."""
        if self.rank == 0:
            logger.warning(message, *arguments)

    def end(self, state: State, step: int | None, reason: str) -> None:
        """Write how this start ended."""
        if self.rank == 0:
            outcome = Outcome(
                state=state,
                step=step,
                num_steps=self.plan.config.train.num_steps,
                reason=reason,
                attempt=self.journal.attempt,
                job_id=job_id(),
            )
            with suppress(OSError):  # the exit status and the journal say it too
                write_outcome(self.run_dir, outcome)


@dataclass(frozen=True)
class _Past:
    """What the journal tells of the starts before."""

    attempt: int
    skipped: set[int]
    roll_backs: int
    last_alive: float | None
    """Unix seconds at which a start that gave its lock not back renewed it last."""
    longest_save_s: float
    """Of the checkpoints so far, so that the first save of this start has its time reserved."""
    is_new: bool
    """The folder was not there before."""


@contextmanager
def start_attempt(plan: Plan, groups: Groups) -> Iterator[Attempt]:
    """Take the run folder for this job, and tell its journal how it goes. Collective.

    Raises:
        UserError: another job uses the folder, it cannot be written, or a word of
            `resilience.faults` or the deadline is wrong.
    """
    run_dir = Path(plan.config.run_dir)
    faults = [parse_fault(text) for text in plan.config.resilience.faults]
    deadline = Deadline(read_deadline(), plan.config.resilience.stop_margin_s)
    lock = RunLock(run_dir, job_id()) if groups.rank == 0 else None
    past = from_rank_0(lambda: _take(run_dir, lock))
    deadline.note_save(past.longest_save_s)
    attempt = _make_attempt(plan, groups.rank, past, faults, deadline)
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    attempt.tell(
        "start",
        world_size=groups.world_size,
        hosts=sorted(set(hosts)),
        pid=os.getpid(),
        launched=round(psutil.Process().create_time(), 3),
        previous_alive=past.last_alive,
        job_id=job_id(),
        restart_count=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        num_steps=plan.config.train.num_steps,
    )
    attempt.end(State.running, None, "started")
    is_mistake = False
    try:
        attempt.at("start", 1)
        yield attempt
    except BaseException as error:
        _tell_failure(attempt, error)
        is_mistake = isinstance(error, UserError)
        raise
    finally:
        if attempt.watchdog is not None:
            attempt.watchdog.stop()
        if lock is not None:
            with suppress(OSError):
                lock.release()
            if is_mistake and past.is_new:
                _leave_no_folder(run_dir)


def _leave_no_folder(run_dir: Path) -> None:
    """Remove a run folder that a mistake has left without anything but the tale of the mistake."""
    ours = {JOURNAL_FILE, OUTCOME_FILE}
    with suppress(OSError):
        if {path.name for path in run_dir.iterdir()} <= ours:
            for name in ours:
                (run_dir / name).unlink(missing_ok=True)
            run_dir.rmdir()


def job_id(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the id of the Slurm job that this process is part of."""
    return environment.get("SLURM_JOB_ID")


def _take(run_dir: Path, lock: RunLock | None) -> _Past:
    """Lock the folder and read its journal; end a roll-back that a crash has interrupted."""
    assert lock is not None, "rank 0 alone takes the folder"
    is_new = not run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        last_alive = renewed_at(lock.path)
        lock.acquire()
        events = read_journal(run_dir)
        last = next(
            (event for event in reversed(events) if event["event"] in (ROLL_BACK, ROLLED_BACK)),
            None,
        )
        if last is not None and last["event"] == ROLL_BACK:
            drop_after(run_dir / CHECKPOINTS, last["to_step"])
    except OSError as error:
        raise UserError(
            f"run_dir={run_dir} cannot be written ({error.strerror or error}); choose a folder "
            "that can"
        ) from error
    roll_backs = sum(event["event"] == ROLL_BACK for event in events)
    saves = (event["seconds"] for event in events if event["event"] == "saved")
    return _Past(
        attempt=next_attempt(events),
        skipped=skipped_steps(events),
        roll_backs=roll_backs,
        last_alive=last_alive,
        longest_save_s=max(saves, default=0.0),
        is_new=is_new,
    )


def _make_attempt(
    plan: Plan, rank: int, past: _Past, faults: list[Fault], deadline: Deadline
) -> Attempt:
    config, run_dir = plan.config.resilience, Path(plan.config.run_dir)
    lines = PatientLines()
    journal = Journal(run_dir, attempt=past.attempt, rank=rank, lines=lines)
    watchdog = None
    if config.hang_timeout_s is not None:
        watchdog = Watchdog(
            run_dir, journal, timeout_s=config.hang_timeout_s, grace_s=config.hang_grace_s
        )
    return Attempt(
        plan=plan,
        rank=rank,
        journal=journal,
        lines=lines,
        faults=FaultInjector(faults, run_dir, journal),
        watchdog=watchdog,
        deadline=deadline,
        skipped=past.skipped | set(config.skip_steps),
        roll_backs=past.roll_backs,
    )


def _tell_failure(attempt: Attempt, error: BaseException) -> None:
    """Write why this start ended by an exception."""
    if isinstance(error, StopRequested):
        attempt.tell("stop", reason=error.signal_name, seconds=_since_signal())
        attempt.end(State.stopped, None, error.signal_name)
    elif isinstance(error, UserError):
        attempt.tell("error", message=str(error))
        attempt.end(State.failed, None, str(error))
    elif not (isinstance(error, SystemExit) and not error.code):
        attempt.journal.write("error", message=f"{type(error).__name__}: {error}")
        attempt.end(State.failed, None, f"{type(error).__name__}: {error}")


def _since_signal() -> float:
    return round(time.monotonic() - SIGNALS.received_at, 3)
