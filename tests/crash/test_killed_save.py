"""`kill -9` of training at random moments of a save: what is there loads, and training goes on.

CRASH_KILLS is the number of kills: 5 unless set; `make test-crash` sets more.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.conftest import _run_in_world
from tests.parallel.short_runs import DISTRIBUTED_OPTIMIZER, short_plan
from tests.parallel.test_checkpoint_layouts import digests, train_on

NUM_KILLS = int(os.environ.get("CRASH_KILLS", "5"))
NUM_STEPS = 6
PATIENCE_S = 60.0
LAYOUTS = {"one": (1, [], (NUM_KILLS + 1) // 2), "dp2": (2, DISTRIBUTED_OPTIMIZER, NUM_KILLS // 2)}
"""Ranks, overrides and kills."""

pytestmark = pytest.mark.timeout(120 + 20 * NUM_KILLS)


@dataclass(frozen=True)
class Run:
    """Ranks that train and save every step; they live until they are killed."""

    processes: list[BaseProcess]
    saves: Connection
    """From rank 0: the step whose save begins now, None when the last is complete."""

    def next_save(self) -> int | None:
        assert self.saves.poll(PATIENCE_S), "no save began"
        return self.saves.recv()

    def all_saves_s(self) -> list[float]:
        """Return how long each save took, if the run waits for the disk after each."""
        ends = [time.monotonic() for _ in iter(self.next_save, None)]
        return [end - begin for begin, end in itertools.batched(ends, 2)]


def save_every_step(run_dir: Path, overrides: list[str], saves: Connection) -> None:
    """Resume, and save after every step until the last."""
    from ring_train.checkpoint import TrainState
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer

    plan = short_plan([*overrides, f"run_dir={run_dir}"])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        checkpoints = Checkpointer(plan, groups.collection)
        first = checkpoints.restore_or_init(model, optimizer).step
        for step in range(first, NUM_STEPS):
            train_on(plan, model, optimizer, groups, step)
            if groups.rank == 0:
                saves.send(step + 1)
            checkpoints.save(TrainState(step=step + 1), model, optimizer)
            if groups.rank == 0 and not plan.config.checkpoint.async_save:
                saves.send(step + 1)
        checkpoints.finish()
        if groups.rank == 0:
            saves.send(None)
        signal.pause()


@contextmanager
def running(run_dir: Path, ranks: int, overrides: list[str]) -> Iterator[Run]:
    """Ranks that resume a run folder; they are dead at the end."""
    context = multiprocessing.get_context("fork")
    heard, told = context.Pipe(duplex=False)
    store = run_dir.with_name(f"rendezvous_{time.monotonic_ns()}")
    processes: list[BaseProcess] = []
    for rank in range(ranks):
        body = (rank, ranks, store, lambda: save_every_step(run_dir, overrides, told))
        process = context.Process(target=_run_in_world, args=body)
        with warnings.catch_warnings():
            # As in tests/conftest.py: threads of pools, idle here.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded")
            process.start()
        processes.append(process)
    told.close()
    try:
        yield Run(processes, heard)
    finally:
        for process in processes:
            process.kill()
            process.join()


def newest(run_dir: Path) -> int:
    """Return the newest step, 0 if there is none; a damaged one is an error."""
    from ring_train.checkpoint.folders import newest_step

    return newest_step(run_dir / "checkpoints") or 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_killed_save_leaves_a_checkpoint_to_go_on_from(
    layout: str, warm_megatron: None, tmp_path: Path
) -> None:
    ranks, overrides, num_kills = LAYOUTS[layout]
    quiet, run_dir = tmp_path / "quiet", tmp_path / "killed"
    words = [*overrides, "checkpoint.keep=null", "checkpoint.async_save=false"]
    with running(quiet, ranks, words) as run:
        typical_s = statistics.median(run.all_saves_s())
    expected = {step: digests(quiet, step) for step in range(1, NUM_STEPS + 1)}
    rng = random.Random(layout)
    complete = torn = 0
    for _ in range(num_kills):
        with running(run_dir, ranks, overrides) as run:
            begun = run.next_save()
            if begun and rng.random() < 0.5:
                begun = run.next_save()
            time.sleep(rng.uniform(0, 2 * typical_s))
            rng.choice(run.processes).kill()
            time.sleep(rng.choice((0, 0.1)))
        torn += any(run_dir.glob("checkpoints/*.partial"))
        found = newest(run_dir)
        # The save before the one that began may still be under way, that before it is not.
        assert max(complete, begun - 2 if begun else NUM_STEPS) <= found <= NUM_STEPS
        assert not found or digests(run_dir, found) == expected[found]
        complete = found
        if complete == NUM_STEPS:
            shutil.rmtree(run_dir)
            complete = 0
    with running(run_dir, ranks, overrides) as run:
        for _ in iter(run.next_save, None):
            pass
    assert digests(run_dir, NUM_STEPS) == expected[NUM_STEPS]
    assert not any(run_dir.glob("checkpoints/*.partial"))
    if num_kills >= 20:
        assert torn, "no kill fell into a save"
