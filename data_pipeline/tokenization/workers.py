"""Processes that encode blocks, in the order of the blocks.

Unusual: workers are forked, because the tokenizer is then loaded and held in memory once; each
talks to the parent through a pipe of its own and ends itself as soon as that pipe closes, so
nothing lingers after a `kill -9` of the parent.
"""

import multiprocessing
import os
import queue
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Self

from data_pipeline.config import PipelineError
from data_pipeline.sources import Block
from data_pipeline.tokenization.encode_block import EncodedBlock

BLOCKS_IN_FLIGHT = 2
"""A worker: one it encodes, one it waits with; bounds the memory."""

type EncodeBlock = Callable[[Block, int], EncodedBlock]


class Workers:
    """As many forked processes as asked, or none if that is one."""

    def __init__(self, encode: EncodeBlock, num_workers: int) -> None:
        self._encode = encode
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        if num_workers == 1:
            return
        context = multiprocessing.get_context("fork")
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            arguments = (encode, theirs, list(self._pipes))
            process = context.Process(target=_work, args=arguments, daemon=True)
            with warnings.catch_warnings():
                # OpenBLAS has threads by now; it prepares them for a fork itself.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
            theirs.close()
            self._processes.append(process)

    def encode[T](
        self, blocks: Iterable[tuple[T, Block, int]]
    ) -> Iterator[tuple[T, Block, EncodedBlock]]:
        """Yield (label, block, encoded) for each (label, block, number), in order."""
        if not self._pipes:
            for label, block, number in blocks:
                yield label, block, self._encode(block, number)
            return
        waiting: deque[tuple[T, Block, Connection]] = deque()
        for turn, (label, block, number) in enumerate(blocks):
            if len(waiting) == BLOCKS_IN_FLIGHT * len(self._pipes):
                yield _receive(*waiting.popleft())
            pipe = self._pipes[turn % len(self._pipes)]
            _send(pipe, (block, number))
            waiting.append((label, block, pipe))
        while waiting:
            yield _receive(*waiting.popleft())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()


def _send(pipe: Connection, task: tuple[Block, int]) -> None:
    try:
        pipe.send(task)
    except OSError:
        raise _worker_died() from None


def _receive[T](label: T, block: Block, pipe: Connection) -> tuple[T, Block, EncodedBlock]:
    try:
        answer = pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        answer.tokens = pipe.recv_bytes()
    except (EOFError, ConnectionError):
        raise _worker_died() from None
    return label, block, answer


def _worker_died() -> PipelineError:
    return PipelineError(
        "a worker died (killed, or out of memory); what was committed is kept: run the same "
        "command again, with fewer workers if memory is short"
    )


def _work(encode: EncodeBlock, pipe: Connection, inherited: list[Connection]) -> None:
    """Encode what comes through the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    for connection in inherited:
        connection.close()  # else a sibling would keep our pipe open when the parent is killed
    tasks: queue.SimpleQueue[tuple[Block, int]] = queue.SimpleQueue()
    threading.Thread(target=_fetch, args=(pipe, tasks), daemon=True).start()
    while True:
        block, number = tasks.get()
        answer: EncodedBlock | Exception
        tokens = None
        try:
            answer = encode(block, number)
            tokens, answer.tokens = answer.tokens, None
        except Exception as error:  # handed to the parent, which raises it
            answer = error
        try:
            pipe.send(answer)
            if tokens is not None:
                pipe.send_bytes(tokens.data.cast("B") if len(tokens) else b"")
        except OSError:
            os._exit(1)


def _fetch(pipe: Connection, tasks: queue.SimpleQueue[tuple[Block, int]]) -> None:
    """Take tasks off the pipe at once: a parent that sends never waits for one that encodes."""
    while True:
        try:
            tasks.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)
