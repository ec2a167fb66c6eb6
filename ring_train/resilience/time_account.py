"""Where the time of a rank goes, by cause."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class TimeAccount:
    """Seconds of this rank's main thread by cause, since they were last taken."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = time.monotonic()

    @contextmanager
    def spend(self, cause: str) -> Iterator[None]:
        """Count the time within for a cause, also if it ends by an exception; do not nest."""
        began = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - began
            self._seconds[cause] = self._seconds.get(cause, 0.0) + spent

    def take(self) -> dict[str, float]:
        """Return the seconds by cause and begin anew; `other` is what no cause was given for."""
        now = time.monotonic()
        taken, self._seconds = self._seconds, {}
        taken["other"] = max(0.0, now - self._since - sum(taken.values()))
        self._since = now
        return {cause: round(seconds, 4) for cause, seconds in taken.items()}
