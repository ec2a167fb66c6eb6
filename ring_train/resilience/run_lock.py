"""run.lock: one job at a time uses a run folder.

The file names the job and is renewed while it lives. File locks would not do: on the file systems
of clusters they are often local to a node or missing. Of a lock of another host only its renewal
tells life from death, and clocks of hosts differ, so it is watched rather than dated.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ring_train.errors import UserError

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
RENEW_S = 10.0
STALE_S = 45.0
"""A lock that is not renewed for so long is that of a dead job; three renewals and a half."""


class RunInUse(UserError):
    """Another job that lives uses the run folder."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock: rank 0 of a job."""

    host: str
    pid: int
    started: str
    """When the process started, as the kernel counts: a pid is used again."""
    job_id: str | None
    nonce: str


class RunLock:
    """The lock of a run folder, held by one process.

    Args:
        run_dir: the run folder, which exists.
        job_id: of Slurm; a requeued job takes over its own lock at once.
    """

    def __init__(self, run_dir: Path, job_id: str | None) -> None:
        self.path = run_dir / LOCK_FILE
        pid = os.getpid()
        nonce = secrets.token_hex(8)
        self.owner = Owner(socket.gethostname(), pid, _start_of(pid) or "", job_id, nonce)
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock and renew it from now on.

        Raises:
            RunInUse: a live job holds it.
            OSError: the folder cannot be written.
        """
        text = json.dumps(asdict(self.owner))
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            self._take_over(text)
        else:
            with os.fdopen(descriptor, "w") as file:
                file.write(text)
        threading.Thread(target=self._renew, daemon=True, name="run lock").start()

    def release(self) -> None:
        """Give the lock back; one that somebody else has taken stays."""
        self._released.set()
        if read_owner(self.path) == self.owner:
            self.path.unlink(missing_ok=True)

    def _take_over(self, text: str) -> None:
        """Replace the lock of a dead job."""
        holder = read_owner(self.path)
        if holder is not None and _is_alive(self.path, holder, self.owner):
            raise RunInUse(
                f"run_dir={self.path.parent} is in use by a live job (host {holder.host}, process "
                f"{holder.pid}, job {holder.job_id or 'without Slurm'}); wait for it, cancel it, "
                "or choose another run_dir"
            )
        mine = self.path.with_name(f"{LOCK_FILE}.{self.owner.nonce}")
        mine.write_text(text)
        mine.replace(self.path)
        time.sleep(0.2)  # two jobs that take over at the same time: the last one has it
        if read_owner(self.path) != self.owner:
            raise RunInUse(
                f"run_dir={self.path.parent} was taken by another job at this moment; "
                "run one job at a time"
            )

    def _renew(self) -> None:
        while not self._released.wait(RENEW_S):
            try:
                os.utime(self.path)
            except OSError as error:
                logger.warning("%s could not be renewed (%s)", self.path, error)


def read_owner(path: Path) -> Owner | None:
    """Return who holds a lock, None if nobody does or the file is torn."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_alive(path: Path, holder: Owner, seeker: Owner) -> bool:
    """Return whether the process that holds a lock lives; may take STALE_S to find out."""
    if holder.host == seeker.host:
        return _start_of(holder.pid) == holder.started
    if holder.job_id is not None and holder.job_id == seeker.job_id:
        return False  # requeued: Slurm has ended what ran before
    first = renewed_at(path)
    deadline = time.monotonic() + STALE_S
    logger.warning("%s is held by host %s: watching for a sign of life", path, holder.host)
    while time.monotonic() < deadline:
        time.sleep(1.0)
        if renewed_at(path) != first:
            return path.exists()
    return False


def renewed_at(path: Path) -> float | None:
    """Return the Unix seconds at which a lock was renewed last, None if there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """Return when a process of this host started, in ticks since boot; None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else rest[18]
