"""A queue within the process for the results of megatron-core's checkpoint writers.

megatron-core 0.19.2 starts a manager process per rank for them, by `spawn`: ten seconds and 630 MB
for a synchronous save, whose writers are threads of the same process, and the manager outlives a
forked rank. A save in a process of its own (async) would need the original again.
"""

import queue
from typing import Any


def install() -> None:
    """Make megatron-core's writers report through `queue.Queue`."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    results: Any = queue.Queue()  # megatron-core declares None
    filesystem_async._results_queue = results
