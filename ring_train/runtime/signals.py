"""Signals that ask a job to stop: SIGTERM of a preemption or a cancel, SIGUSR1 of `--signal`.

Before the training loop there is nothing to save, so a signal ends the process at once by
`StopRequested`. Within `deferred()` it is only noted: the loop saves at its next safe point.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(BaseException):
    """A signal asked the job to stop while there was nothing to save.

    No Exception, so that nothing that handles failures takes it for one.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"stopped by {name} before training began")
        self.signal_name = name


class StopSignals:
    """What signals this process has received."""

    def __init__(self) -> None:
        self.name: str | None = None
        """Of the first stop signal; None = none yet."""
        self.received_at = 0.0
        """time.monotonic of the first."""
        self._deferred = False

    def install(self) -> None:
        """Receive the stop signals from now on. Call it in the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only note signals within."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.name is None:
            self.name, self.received_at = signal.Signals(number).name, time.monotonic()
        if not self._deferred:
            raise StopRequested(self.name)


SIGNALS = StopSignals()
"""Of this process: handlers are process-wide, so there is one."""
