"""Starts a run again and again until it has ended, as slurm/ does, without a person.

Ranks are forks of this process, which has imported everything, or cold processes of their own. They
meet over a TCP store like those of srun or torchrun. If one dies, the others have a while to notice
and to dump what they know; then they are killed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ring_train.runtime.errors import HANG_STATUS, STOPPED_STATUS, USER_ERROR_STATUS

WAIT_AFTER_DEATH_S = 4.0
"""srun --wait, shortened."""
LONGEST_ATTEMPT_S = 150.0
MAX_ATTEMPTS = 12
AGAIN = (STOPPED_STATUS, HANG_STATUS)


@dataclass
class Story:
    """What became of a run."""

    statuses: list[list[int | None]] = field(default_factory=list)
    """Of each rank, by start; negative = killed by that signal."""

    @property
    def num_attempts(self) -> int:
        """Starts of the run."""
        return len(self.statuses)

    @property
    def succeeded(self) -> bool:
        """Whether the last start ended with 0 on every rank."""
        return set(self.statuses[-1]) == {0}


@dataclass(frozen=True)
class Start:
    """How ranks are started."""

    words: Sequence[str]
    """Of `ring_train.jobs.pretrain`."""
    num_ranks: int
    log: Path
    """Receives what the ranks say."""
    cold: bool = False
    """Processes of their own instead of forks: they import everything again."""
    job: str = "pretrain"
    on_start: Callable[[list[int]], None] = lambda pids: None
    """Called with the process ids of the ranks."""


def run_to_the_end(starts: Callable[[int], Start]) -> Story:
    """Start a run until it ends with 0 or by a mistake of a person.

    Args:
        starts: how to start it the nth time, from 1.
    """
    story = Story()
    while story.num_attempts < MAX_ATTEMPTS:
        statuses = run_once(starts(story.num_attempts + 1))
        story.statuses.append(statuses)
        if set(statuses) <= {0, USER_ERROR_STATUS}:
            break
    return story


def run_once(start: Start, longest_s: float = LONGEST_ATTEMPT_S) -> list[int | None]:
    """Start all ranks once; return their exit statuses."""
    port = _free_port()
    ranks: list[_Rank] = []
    for rank in range(start.num_ranks):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(start.num_ranks),
            "LOCAL_WORLD_SIZE": str(start.num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        ranks.append(_Cold(start, environment) if start.cold else _Forked(start, environment))
    start.on_start([rank.pid for rank in ranks])
    deadline = time.monotonic() + longest_s
    try:
        while any(rank.status() is None for rank in ranks) and time.monotonic() < deadline:
            if any(rank.status() not in (None, 0) for rank in ranks):
                deadline = min(deadline, time.monotonic() + WAIT_AFTER_DEATH_S)
            time.sleep(0.05)
    finally:
        for rank in ranks:
            if rank.status() is None:
                os.kill(rank.pid, signal.SIGKILL)
        while any(rank.status() is None for rank in ranks):
            time.sleep(0.01)
    return [rank.status() for rank in ranks]


class _Forked:
    """A rank that is a fork of this process."""

    def __init__(self, start: Start, environment: dict[str, str]) -> None:
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_main, args=(start, environment))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This process .* is multi-threaded")
            self.process.start()
        self.pid = self.process.pid or 0

    def status(self) -> int | None:
        return self.process.exitcode


class _Cold:
    """A rank that is a process of its own."""

    def __init__(self, start: Start, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", f"ring_train.jobs.{start.job}", *start.words]
        with start.log.open("a") as log:
            self.process = subprocess.Popen(
                command, env=os.environ | environment, stdout=log, stderr=log
            )
        self.pid = self.process.pid

    def status(self) -> int | None:
        return self.process.poll()


_Rank = _Forked | _Cold


def _main(start: Start, environment: dict[str, str]) -> None:
    """Run one forked rank; never returns to the test that forked it."""
    import importlib

    from ring_train.runtime.errors import run_job

    os.environ.update(environment)
    log = os.open(start.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # pytest's capture has replaced the streams of Python.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    status = 1
    try:
        module = importlib.import_module(f"ring_train.jobs.{start.job}")
        run_job(lambda: module.main(list(start.words)))
    except SystemExit as stop:
        status = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
