"""Fixtures of all tests, above all `on_ranks`, which runs a function on forked gloo ranks.

Unusual: ranks are forks of the pytest process, which has imported torch and megatron-core once, so
a test on two ranks costs about a second. Only tests that ask for `on_ranks` pay for that import.
"""

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import hypothesis
import jaxtyping
import pytest

# Read when triton is imported: its kernels run on the CPU. On a GPU, TRITON_INTERPRET=0.
os.environ.setdefault("TRITON_INTERPRET", "1")

# Shapes in signatures count, except in Triton's kernels, which nothing may wrap.
OPS = Path(__file__).parents[1] / "ring_train" / "ops"
jaxtyping.install_import_hook(
    [f"ring_train.ops.{path.stem}" for path in OPS.glob("[a-z]*.py")], "beartype.beartype"
)

# Examples take as long as a shared machine lets them; pytest's timeout bounds the whole.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")

DEFAULT_TIMEOUT_S = 120.0
GRACE_S = 1.0


class OnRanks(Protocol):
    """The type of the `on_ranks` fixture."""

    def __call__(
        self,
        num_ranks: int,
        function: Callable[..., Any],
        *args: Any,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> list[Any]:
        """Run `function(*args)` on forked ranks of a gloo world; return its results by rank.

        torch.distributed is initialised and RANK, WORLD_SIZE and their like are set; megatron's
        groups are not: the function calls `start_runtime(plan)`, as often as it likes. Results must
        be picklable (convert tensors with care: they are copied). The first exception of a rank is
        raised here with its traceback, and the other ranks are killed.
        """
        ...


class RankError(AssertionError):
    """A rank raised, died or ran out of time."""


class RankTimeout(RankError):
    """Ranks ran out of time."""

    def __init__(self, ranks: list[int], message: str) -> None:
        super().__init__(message)
        self.ranks = ranks


@pytest.fixture(scope="session")
def warm_megatron() -> None:
    """megatron-core is imported, and works without CUDA."""
    import torch
    import torch._dynamo  # every optimizer imports it: better once here than in each rank

    import ring_train.runtime.distributed  # noqa: F401

    torch.set_num_threads(1)


@pytest.fixture
def on_ranks(warm_megatron: None, tmp_path: Path) -> OnRanks:
    """See OnRanks."""
    counter = iter(range(1_000_000))

    def run(
        num_ranks: int,
        function: Callable[..., Any],
        *args: Any,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> list[Any]:
        __tracebackhide__ = True
        store = tmp_path / f"rendezvous_{next(counter)}"
        return _run_ranks(num_ranks, store, lambda: function(*args), timeout_s)

    return run


def _run_ranks(num_ranks: int, store: Path, body: Callable[[], Any], timeout_s: float) -> list[Any]:
    __tracebackhide__ = True
    context = multiprocessing.get_context("fork")
    sys.stdout.flush()
    sys.stderr.flush()
    connections, processes = [], []
    for rank in range(num_ranks):
        connection, childs = context.Pipe()
        process = context.Process(target=_child, args=(rank, num_ranks, store, body, childs))
        with warnings.catch_warnings():
            # Threads of execnet and of torch's pools are idle here; the child starts its own.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded")
            process.start()
        childs.close()
        connections.append(connection)
        processes.append(process)
    try:
        return _collect(connections, timeout_s)
    except RankTimeout as error:
        for rank in error.ranks:
            os.kill(processes[rank].pid or 0, signal.SIGUSR1)
        time.sleep(GRACE_S)
        stacks = [_stack_file(store, rank).read_text() for rank in error.ranks]
        raise RankError("\n".join([str(error), *stacks])) from None
    finally:
        # Ranks live until all are heard: one that left early would tear its peers' connections.
        for process in processes:
            process.kill()
            process.join()


def _collect(connections: list[Connection], timeout_s: float) -> list[Any]:
    """Return one result per rank, or raise RankError with what the failing ranks said."""
    __tracebackhide__ = True
    waiting: dict[Any, int] = {reader: rank for rank, reader in enumerate(connections)}
    results: dict[int, Any] = {}
    failures: list[str] = []
    deadline = time.monotonic() + timeout_s
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = waiting.pop(connection)
            succeeded, value = _receive(connection)
            if succeeded:
                results[rank] = value
            else:
                # Its peers may wait for it in vain: hear what they say, briefly.
                deadline = min(deadline, time.monotonic() + GRACE_S)
                failures.append(f"rank {rank} of {len(connections)}: {value}")
    if failures:
        raise RankError("\n".join(failures))
    if waiting:
        ranks = sorted(waiting.values())
        raise RankTimeout(
            ranks, f"ranks {ranks} of {len(connections)} not finished after {timeout_s:.0f} s"
        )
    return [results[rank] for rank in range(len(connections))]


def _receive(connection: Any) -> tuple[bool, Any]:
    try:
        return pickle.loads(connection.recv_bytes())
    except EOFError:
        return False, "died without a word (killed, or a crash in native code)"


def _child(
    rank: int, num_ranks: int, store: Path, body: Callable[[], Any], connection: Connection
) -> None:
    """Run one rank, tell the result and wait to be killed: no teardown or atexit of the parent."""
    stacks = _stack_file(store, rank).open("w")
    faulthandler.register(signal.SIGUSR1, stacks)
    # Garbage of the parent must not be finalised here: it may wait for a thread that is not forked.
    gc.freeze()
    try:
        payload = pickle.dumps((True, _run_in_world(rank, num_ranks, store, body)))
    except BaseException:
        payload = pickle.dumps((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        connection.send_bytes(payload)
        connection.recv_bytes()
    finally:
        os._exit(1)


def _stack_file(store: Path, rank: int) -> Path:
    """Return where a rank writes the stacks of its threads on SIGUSR1."""
    return store.with_name(f"{store.name}_stacks_{rank}")


def _run_in_world(rank: int, num_ranks: int, store: Path, body: Callable[[], Any]) -> Any:
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(num_ranks),
        LOCAL_WORLD_SIZE=str(num_ranks),
    )
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    # Some bodies leave this world at once: not while another rank is still connecting to them.
    dist.barrier()
    return body()
