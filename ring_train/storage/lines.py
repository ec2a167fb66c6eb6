"""Files of lines that many moments append to, and that no failing disk leaves with half a line.

A disk that is full or away must not end a run that computes well, so lines that cannot be written
wait in memory, in order, until they can.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path


def append_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Append whole lines, or nothing.

    Args:
        path: the file; made if it is not there.
        text: ends with a newline. One write: processes that append to one file do not mix.
        durable: it is on the disk when this returns.

    Raises:
        OSError: it could not be written, and the file is as it was.
    """
    data = text.encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        written = os.write(descriptor, data)
        if written < len(data):
            os.ftruncate(descriptor, size)
            raise OSError(28, os.strerror(28), str(path))
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class PatientLines:
    """Appends lines to files, keeping those in memory that a disk does not take yet."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Path, str]] = []
        self._lock = threading.Lock()
        self.failing_since: float | None = None
        """When the oldest waiting line should have been written, time.monotonic; None = all are."""
        self.problem = ""
        """What the disk said last."""

    def append(self, path: Path, text: str, *, durable: bool = False) -> None:
        """Append lines, after those that wait; a failing disk is noted, not raised."""
        with self._lock:
            self._waiting.append((path, text))
            try:
                self._flush(durable=durable)
            except OSError as error:
                self.failing_since = self.failing_since or time.monotonic()
                self.problem = f"{path}: {error.strerror or error}"

    def discard(self, path: Path) -> None:
        """Forget the lines that wait for a file."""
        with self._lock:
            self._waiting = [line for line in self._waiting if line[0] != path]

    def _flush(self, *, durable: bool) -> None:
        while self._waiting:
            path, text = self._waiting[0]
            append_text(path, text, durable=durable)
            del self._waiting[0]
        self.failing_since = None
