"""How long this thread has waited for other ranks, measured where every collective waits.

Unusual: `Work.wait` of torch.distributed is replaced by one that reads the clock before and after.
Every blocking collective, and every handle of an asynchronous one, waits through it. That is the
whole truth for gloo, where waiting blocks the thread; NCCL only makes a stream wait.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import Any

import torch.distributed as dist

_waited = threading.local()


def waited_s() -> float:
    """Return the seconds that this thread has spent in waits for collectives so far."""
    return getattr(_waited, "seconds", 0.0)


@functools.cache
def count_waiting() -> None:
    """Count from now on; may be called again."""
    original = dist.Work.wait

    @functools.wraps(original)
    def wait(self: dist.Work, *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return original(self, *args, **kwargs)
        finally:
            _waited.seconds = waited_s() + time.perf_counter() - begin

    dist.Work.wait = wait
