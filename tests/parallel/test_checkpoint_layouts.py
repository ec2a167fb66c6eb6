"""The weights of a checkpoint are those of the model, whatever layouts save and load it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import EP2, PP2, TP2, short_plan, weights_by_name

if TYPE_CHECKING:
    import torch

LAYOUTS = {"tp2": (2, TP2), "pp2": (2, PP2), "ep2": (2, EP2), "tp2_ep2": (2, [*TP2, *EP2])}
TWO_DEPTHS = ["model.mtp_num_layers=2"]


def save(run_dir: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Train one step, so that expert biases differ too, and save; return the weights."""
    from ring_train.checkpoint import Checkpointer, TrainState
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step
    from tests.parallel.streams import make_micro_batches

    plan = short_plan([*TWO_DEPTHS, *overrides, f"run_dir={run_dir}"])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        rows = make_micro_batches(plan, 0, groups.dp_rank)
        train_step(plan, model, optimizer, rows, groups.collection, step=0, num_domains=1)
        checkpoints = Checkpointer(plan, groups.collection)
        checkpoints.save(TrainState(step=1), model, optimizer)
        checkpoints.finish()
        return weights_by_name(model)


def load(run_dir: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Load the checkpoint into a model of another seed; return its weights."""
    from ring_train.checkpoint import load_weights
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime

    plan = short_plan([*TWO_DEPTHS, *overrides, "seed=1"])
    folder = run_dir / "checkpoints" / "step_00000001"
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        load_weights(folder, model, plan, groups.collection)
        return weights_by_name(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_saved_under_a_layout_load_on_one_rank(
    layout: str, on_ranks: OnRanks, tmp_path: Path
) -> None:
    ranks, overrides = LAYOUTS[layout]
    parts = on_ranks(ranks, save, tmp_path, overrides)
    loaded = on_ranks(1, load, tmp_path, [])[0]
    assert_same(parts, loaded)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_saved_on_one_rank_load_under_a_layout(
    layout: str, on_ranks: OnRanks, tmp_path: Path
) -> None:
    ranks, overrides = LAYOUTS[layout]
    saved = on_ranks(1, save, tmp_path, [])[0]
    assert_same(on_ranks(ranks, load, tmp_path, overrides), saved)


def assert_same(parts: list[dict[str, torch.Tensor]], whole: dict[str, torch.Tensor]) -> None:
    for part in parts:
        assert not [name for name, weight in part.items() if not weight.equal(whole[name])]
    assert set().union(*parts) == whole.keys()
    assert any(weight.any() for name, weight in whole.items() if name.endswith("expert_bias"))
