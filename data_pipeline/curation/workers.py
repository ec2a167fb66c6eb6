"""Processes that do blocks, and end when the command does."""

import logging
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from data_pipeline.config import PipelineError

logger = logging.getLogger(__name__)

PROGRESS_INTERVAL_S = 10.0


def start_workers(workers: int) -> Executor:
    """Return an executor of as many processes; one worker is this process.

    Raises:
        PipelineError: there is nobody to do the work.
    """
    if workers < 1:
        raise PipelineError(f"workers={workers} is below 1; give a number of processes")
    prepare_process()
    if workers == 1:
        return _ThisProcess()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_pipeline.curation.passes"])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def run_all(
    pool: Executor, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], title: str
) -> None:
    """Run function(*task) for every task and log progress now and then.

    Raises:
        PipelineError: as the function, or a process was killed from outside.
    """
    futures = [pool.submit(function, *task) for task in tasks]
    last_s = time.monotonic()
    try:
        for number, future in enumerate(as_completed(futures), start=1):
            future.result()
            if time.monotonic() - last_s > PROGRESS_INTERVAL_S:
                last_s = time.monotonic()
                logger.info("%s: %d of %d", title, number, len(futures))
    except BrokenProcessPool:
        raise PipelineError(
            f"{title}: a worker was killed, perhaps for memory; run again with fewer workers, "
            "finished blocks are kept"
        ) from None
    finally:
        for future in futures:
            future.cancel()


def prepare_process() -> None:
    """Keep datatrove quiet and let it open a file per block."""
    from loguru import logger as datatrove_logger

    datatrove_logger.disable("datatrove")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _ThisProcess(Executor):
    """Runs what is submitted at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return the finished future of a call."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
            raise
        return future


def _start_worker() -> None:
    prepare_process()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when the command is gone, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
