"""Saves in the background: what they hold, who writes it, and how they fail."""

from __future__ import annotations

import resource
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import DISTRIBUTED_OPTIMIZER, EP2, TP2, short_plan
from tests.parallel.test_checkpoint_layouts import digests, train_on

EVENNESS = 0.05
"""Of all bytes; the tiny model has some large tensors, which are not divided."""


def save_and_train_on(run_dir: Path, overrides: list[str]) -> list[list[int]]:
    """Save; change everything while nothing can be written yet; save again and wait.

    Returns the complete checkpoints after each of these.
    """
    from ring_train.checkpoint import TrainState, writing
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer

    may_write = threading.Event()
    write_rank = writing.write_rank
    writing.write_rank = lambda job: (may_write.wait(), write_rank(job))[1]
    plan = short_plan([*overrides, f"run_dir={run_dir}"])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        checkpoints = Checkpointer(plan, groups.collection)
        train_on(plan, model, optimizer, groups, 0)
        checkpoints.save(TrainState(step=1), model, optimizer)
        seen = [checkpoints.steps()]
        train_on(plan, model, optimizer, groups, 1)
        may_write.set()
        checkpoints.save(TrainState(step=2), model, optimizer)
        seen.append(checkpoints.steps())
        checkpoints.finish()
        checkpoints.finish()
        seen.append(checkpoints.steps())
        assert checkpoints.save(TrainState(step=2), model, optimizer) == checkpoints.path(2)
        checkpoints.finish()
    return seen


def save_and_wait(run_dir: Path, overrides: list[str]) -> None:
    """Save after the first and the second step, waiting for each."""
    from ring_train.checkpoint import TrainState
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer

    words = [*overrides, "checkpoint.async_save=false", f"run_dir={run_dir}"]
    plan = short_plan(words)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        checkpoints = Checkpointer(plan, groups.collection)
        for step in (1, 2):
            train_on(plan, model, optimizer, groups, step - 1)
            checkpoints.save(TrainState(step=step), model, optimizer)
            assert checkpoints.steps()[-1] == step


def test_a_save_holds_the_state_of_its_moment(on_ranks: OnRanks, tmp_path: Path) -> None:
    for first, second, third in on_ranks(2, save_and_train_on, tmp_path / "async", TP2):
        assert (first, third) == ([], [1, 2])
        assert 1 in second
    on_ranks(2, save_and_wait, tmp_path / "waiting", TP2)
    for step in (1, 2):
        assert digests(tmp_path / "async", step) == digests(tmp_path / "waiting", step)


@pytest.mark.parametrize(
    "overrides",
    [[], [*DISTRIBUTED_OPTIMIZER, "train.precision=bf16"], TP2, EP2],
    ids=["dp2", "dp2_sharded_bf16", "tp2", "ep2"],
)
def test_ranks_write_everything_once_in_equal_shares(
    overrides: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    from ring_train.checkpoint.manifest import read_manifest

    on_ranks(2, save_and_train_on, tmp_path, overrides)
    manifest = read_manifest(tmp_path / "checkpoints" / "step_00000002")
    sizes = [file.num_bytes for name, file in manifest.files.items() if name.startswith("rank_")]
    assert len(sizes) == 2
    assert abs(sizes[0] - sizes[1]) < EVENNESS * sum(sizes)


def fail_on_one_rank(run_dir: Path) -> list[Any]:
    """Save, save with files of at most some bytes on rank 1, and save once more."""
    from ring_train.checkpoint import CheckpointError, TrainState
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer

    plan = short_plan([f"run_dir={run_dir}"])
    found: list[Any] = []
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        checkpoints = Checkpointer(plan, groups.collection)
        checkpoints.save(TrainState(step=1), model, optimizer)
        checkpoints.finish()
        if groups.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        checkpoints.save(TrainState(step=2), model, optimizer)
        try:
            checkpoints.save(TrainState(step=3), model, optimizer)
        except CheckpointError as error:
            found += [str(error), sorted(path.name for path in checkpoints.folder.iterdir())]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        checkpoints.save(TrainState(step=4), model, optimizer)
        checkpoints.finish()
        return [*found, checkpoints.steps()]


def test_a_rank_that_cannot_write_is_heard_by_all(on_ranks: OnRanks, tmp_path: Path) -> None:
    for message, left, steps in on_ranks(2, fail_on_one_rank, tmp_path):
        assert (
            "step_00000002 could not be saved (File too large); the checkpoints before" in message
        )
        assert left == ["step_00000001"]
        assert steps == [1, 4]


def fail_to_copy_on_one_rank(run_dir: Path) -> list[str]:
    """Save; then fail on rank 1 alone to copy the state to the host, and out of the files."""
    from ring_train.checkpoint import CheckpointError, TrainState, checkpointer
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer

    def refuse(*_: Any) -> Any:
        raise OSError("no copy")

    plan = short_plan([f"run_dir={run_dir}", "checkpoint.async_save=false"])
    found: list[str] = []
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        checkpoints = Checkpointer(plan, groups.collection)
        checkpoints.save(TrainState(step=1), model, optimizer)
        broken: Any = checkpointer
        broken.whole_steps = lambda _: 1 / 0  # reads every manifest
        if groups.rank == 1:
            broken.snapshot = broken.run_copies = broken.newest_step = refuse
        assert not checkpoints.is_new_run()
        for action in (
            lambda: checkpoints.save(TrainState(step=2), model, optimizer),
            lambda: checkpoints.restore_or_init(model, optimizer),
        ):
            try:
                action()
            except CheckpointError as error:
                found.append(str(error))
    return found


def test_a_rank_that_cannot_copy_is_heard_by_all(on_ranks: OnRanks, tmp_path: Path) -> None:
    assert on_ranks(2, fail_to_copy_on_one_rank, tmp_path) == [["no copy", "no copy"]] * 2


def save_at_once(run_dir: Path, overrides: list[str]) -> None:
    """Save before the first step, restore over a trained state, save that as step 1."""
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
        assert checkpoints.is_new_run()
        checkpoints.save(TrainState(), model, optimizer)
        checkpoints.finish()
        train_on(plan, model, optimizer, groups, 0)
        checkpoints.save(TrainState(step=2), model, optimizer)
        checkpoints.finish()
        move(checkpoints.path(2), run_dir / "aside")
        assert checkpoints.restore_or_init(model, optimizer) == TrainState()
        checkpoints.save(TrainState(step=1), model, optimizer)
        train_on(plan, model, optimizer, groups, 0)
        checkpoints.save(TrainState(step=3), model, optimizer)
        checkpoints.finish()
        move(run_dir / "aside", checkpoints.path(2))


def move(path: Path, target: Path) -> None:
    """Rename a folder once. Collective."""
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 0:
        path.rename(target)
    dist.barrier()


def test_a_run_can_go_back_to_before_its_first_step(on_ranks: OnRanks, tmp_path: Path) -> None:
    words = ["train.precision=bf16", *DISTRIBUTED_OPTIMIZER, "checkpoint.keep=null"]
    on_ranks(2, save_at_once, tmp_path, words)
    fresh = digests(tmp_path, 0)
    assert {key.split("/")[0] for key in fresh} == {"weight", "master", "rng"}
    assert digests(tmp_path, 1) == fresh
    assert digests(tmp_path, 3) == digests(tmp_path, 2)
