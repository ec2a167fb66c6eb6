"""Checkpoints of ranks that share the masters, merged and loaded under another layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import OnRanks, RankError
from tests.parallel.short_runs import DISTRIBUTED_OPTIMIZER, EP2, TP2, short_plan, weights_by_name
from tests.parallel.test_checkpoint_layouts import BF16, train_on

if TYPE_CHECKING:
    import torch

SAVED_STEPS = (1, 2, 3, 4)


def train_and_save(run_dir: Path, overrides: list[str]) -> None:
    """Save after every step."""
    from ring_train.checkpoint import TrainState
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer

    plan = short_plan([*overrides, f"run_dir={run_dir}", "checkpoint.keep=null"])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        checkpoints = Checkpointer(plan, groups.collection)
        for step in SAVED_STEPS:
            train_on(plan, model, optimizer, groups, step - 1)
            checkpoints.save(TrainState(step=step), model, optimizer)
        checkpoints.finish()


def load_merged(folder: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    from ring_train.checkpoint.checkpointer import load_weights
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime

    plan = short_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        load_weights(folder, model, plan, groups.collection)
        return weights_by_name(model)


def resume(run_dir: Path, overrides: list[str]) -> None:
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer

    plan = short_plan([*overrides, f"run_dir={run_dir}"])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        Checkpointer(plan, groups.collection).restore_or_init(model, optimizer)


def test_masters_of_many_ranks_become_one_average(on_ranks: OnRanks, tmp_path: Path) -> None:
    import torch

    from ring_train.checkpoint.merging import choose_checkpoints, open_merge, write_merge
    from ring_train.checkpoint.weights import open_weights
    from ring_train.config import DecayCurve

    on_ranks(2, train_and_save, tmp_path, [*BF16, *EP2, *DISTRIBUTED_OPTIMIZER])
    folders = choose_checkpoints(tmp_path, 4, None)
    write_merge(open_merge(folders, DecayCurve.linear), tmp_path / "merged")
    sources = [open_weights(folder) for folder in folders]
    loaded = on_ranks(2, load_merged, tmp_path / "merged", TP2)[0]
    assert loaded.keys() == set(sources[0].names)
    for name, tensor in loaded.items():
        masters = torch.stack([source.read_master(name).double() for source in sources])
        assert torch.equal(tensor, masters.mean(0).float()), name
    moved = [name for name in loaded if not torch.equal(loaded[name], sources[-1].read(name))]
    assert any("expert_bias" in name for name in moved)
    shutil.copytree(tmp_path / "merged", tmp_path / "run" / "checkpoints" / "step_00000004")
    with pytest.raises(RankError, match="holds weights alone, as merged checkpoints do"):
        on_ranks(1, resume, tmp_path / "run", BF16)
