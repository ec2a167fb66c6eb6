"""Ends a job that hangs, and says where each rank stood.

Each rank watches itself: in a job of collectives one rank that hangs is soon waited for by all, so
all of them dump their stacks within one timeout and the odd one out is the culprit. A rank that
hangs inside native code with Python's lock held is seen by faulthandler, whose thread needs none.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from pathlib import Path

from ring_train.resilience.journal import Journal
from ring_train.runtime.errors import HANG_STATUS

logger = logging.getLogger(__name__)

STACKS = "stacks"
PATIENCE = {"save": 4.0, "finish": 4.0, "evaluate": 4.0, "first step": 4.0, "validate": 2.0}
"""How many timeouts a phase may take that waits for disks, compiles or generates."""


class Watchdog:
    """Watches the main thread of one rank from `start` to `stop`.

    Args:
        run_dir: receives stacks/attempt_N_rank_R.txt.
        journal: receives `hang`.
        timeout_s: between two beats.
        grace_s: from the dump to the end of the process.
    """

    def __init__(
        self, run_dir: Path, journal: Journal, *, timeout_s: float, grace_s: float
    ) -> None:
        self.run_dir, self.journal = run_dir, journal
        self.timeout_s, self.grace_s = timeout_s, grace_s
        self._stopped = threading.Event()
        self._last = (time.monotonic(), "start")

    @property
    def stacks_path(self) -> Path:
        """Where this rank's stacks go."""
        name = f"attempt_{self.journal.attempt}_rank_{self.journal.rank}.txt"
        return self.run_dir / STACKS / name

    def start(self) -> None:
        """Watch from now on."""
        self.beat("first step")
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self, phase: str) -> None:
        """Note progress, and what comes next."""
        self._last = (time.monotonic(), phase)

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        interval_s = min(self.timeout_s / 10, 5.0)
        while not self._stopped.wait(interval_s):
            since, phase = self._last
            allowed_s = self.timeout_s * PATIENCE.get(phase, 1.0)
            late_s = time.monotonic() - since
            if late_s > allowed_s:
                self._end(phase, late_s)
            # Fires only if this thread, too, does not run for so long.
            faulthandler.dump_traceback_later(allowed_s * 1.5, exit=True)
        faulthandler.cancel_dump_traceback_later()

    def _end(self, phase: str, late_s: float) -> None:
        """Dump all stacks of this rank, tell the journal, and end the process."""
        path = self.stacks_path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        self.journal.write("hang", phase=phase, seconds=round(late_s, 1), stacks=str(path))
        logger.error(
            "rank %d made no progress in phase %r for %.0f s (resilience.hang_timeout_s=%g); its "
            "stacks are in %s; the job ends",
            *(self.journal.rank, phase, late_s, self.timeout_s, path),
        )
        time.sleep(self.grace_s)
        os._exit(HANG_STATUS)
