"""Processes that encode blocks, in the order of the blocks.

Unusual: workers are forked, because the tokenizer is then loaded and held in memory once; each
talks to the parent through a pipe of its own and ends itself as soon as that pipe closes, so
nothing lingers after a `kill -9` of the parent. Ids come back in memory that both share.
"""

import gc
import mmap
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
from data_pipeline.tokenization.memory import release_freed_memory

BLOCKS_IN_FLIGHT = 2
"""A worker: one it encodes, one it waits with; bounds the memory."""

SLOT_BYTES = 2**23
"""Shared memory for the ids of one block, of which only the pages in use exist; a block with more
ids sends them through the pipe."""

type EncodeBlock = Callable[[Block, int], EncodedBlock]


class Workers:
    """As many forked processes as asked, or none if that is one."""

    def __init__(self, encode: EncodeBlock, num_workers: int) -> None:
        self._encode = encode
        self._pipes: list[Connection] = []
        self._slots: list[memoryview] = []
        self._processes: list[Any] = []
        release_freed_memory()  # of parsing the tokenizer: a fifth of all
        if num_workers == 1:
            return
        gc.freeze()  # a collection in a worker would copy every page it looks at
        context = multiprocessing.get_context("fork")
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            self._slots.append(memoryview(mmap.mmap(-1, BLOCKS_IN_FLIGHT * SLOT_BYTES)))
            arguments = (encode, theirs, self._slots[-1], list(self._pipes))
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
        # A slot is written to again only after the block before it there was yielded and used.
        waiting: deque[tuple[T, Block, int, int]] = deque()
        for turn, (label, block, number) in enumerate(blocks):
            if len(waiting) == BLOCKS_IN_FLIGHT * len(self._pipes):
                yield self._receive(*waiting.popleft())
            round_, worker = divmod(turn, len(self._pipes))
            slot = round_ % BLOCKS_IN_FLIGHT
            _send(self._pipes[worker], (block, number, slot))
            waiting.append((label, block, worker, slot))
        while waiting:
            yield self._receive(*waiting.popleft())

    def _receive[T](
        self, label: T, block: Block, worker: int, slot: int
    ) -> tuple[T, Block, EncodedBlock]:
        pipe = self._pipes[worker]
        try:
            answer = pipe.recv()
            if isinstance(answer, BaseException):
                raise answer
            num_bytes = answer.tokens
            if num_bytes > SLOT_BYTES:
                answer.tokens = pipe.recv_bytes()
            else:
                answer.tokens = _slot(self._slots[worker], slot)[:num_bytes]
        except (EOFError, ConnectionError):
            raise _worker_died() from None
        return label, block, answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()
        gc.unfreeze()


type Task = tuple[Block, int, int]
"""Block, its number, the slot for its ids."""


def _slot(slots: memoryview, slot: int) -> memoryview:
    return slots[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]


def _send(pipe: Connection, task: Task) -> None:
    try:
        pipe.send(task)
    except OSError:
        raise _worker_died() from None


def _worker_died() -> PipelineError:
    return PipelineError(
        "a worker died (killed, or out of memory); what was committed is kept: run the same "
        "command again, with fewer workers if memory is short"
    )


def _work(
    encode: EncodeBlock, pipe: Connection, slots: memoryview, inherited: list[Connection]
) -> None:
    """Encode what comes through the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    for connection in inherited:
        connection.close()  # else a sibling would keep our pipe open when the parent is killed
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    threading.Thread(target=_fetch, args=(pipe, tasks), daemon=True).start()
    while True:
        block, number, slot = tasks.get()
        tokens = memoryview(b"")
        try:
            encoded = encode(block, number)
            tokens = _bytes_of(encoded.tokens)
            encoded.tokens = len(tokens)
            answer: EncodedBlock | Exception = encoded
        except Exception as error:  # handed to the parent, which raises it
            answer = error
        try:
            if len(tokens) <= SLOT_BYTES:
                _slot(slots, slot)[: len(tokens)] = tokens
            pipe.send(answer)
            if len(tokens) > SLOT_BYTES:
                pipe.send_bytes(tokens)
        except OSError:
            os._exit(1)


def _bytes_of(tokens: Any) -> memoryview:
    return memoryview(tokens).cast("B") if len(tokens) else memoryview(b"")


def _fetch(pipe: Connection, tasks: queue.SimpleQueue[Task]) -> None:
    """Take tasks off the pipe at once: a parent that sends never waits for one that encodes."""
    while True:
        try:
            tasks.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)
