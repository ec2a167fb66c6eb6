"""Progress of a run: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from typing import Self

from tqdm import tqdm

logger = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0


class Progress:
    """Bytes of input with documents/s, tokens/s and the time left by bytes."""

    def __init__(self, label: str, total_bytes: int, done_bytes: int) -> None:
        tqdm.monitor_interval = 0  # no thread: workers are forked
        self._bar = tqdm(
            total=total_bytes or None,
            initial=done_bytes,
            desc=label,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        )
        self._total_bytes, self._first_bytes = total_bytes, done_bytes
        self._start_s = self._logged_s = time.monotonic()
        self._documents = self._tokens = 0
        self._done_bytes = done_bytes

    def update(self, done_bytes: int, documents: int, tokens: int) -> None:
        """Add documents and tokens; `done_bytes` is the position in all inputs."""
        self._documents += documents
        self._tokens += tokens
        now_s = time.monotonic()
        elapsed_s = max(now_s - self._start_s, 1e-9)
        rates = (self._documents / elapsed_s, self._tokens / elapsed_s)
        if not self._bar.disable:
            text = f"{rates[0]:.0f} documents/s, {rates[1]:.0f} tokens/s"
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(max(0, done_bytes - self._done_bytes))
        elif now_s - self._logged_s > LOG_INTERVAL_S:
            self._logged_s = now_s
            left = self._left_s(done_bytes, elapsed_s)
            message = "%.0f MB read, %.0f documents/s, %.0f tokens/s%s"
            logger.info(message, done_bytes / 1e6, *rates, left)
        self._done_bytes = done_bytes

    def _left_s(self, done_bytes: int, elapsed_s: float) -> str:
        rate = (done_bytes - self._first_bytes) / elapsed_s
        if not rate or done_bytes > self._total_bytes:
            return ""
        return f", {(self._total_bytes - done_bytes) / rate:.0f} s left"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
