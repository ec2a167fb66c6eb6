"""What is saved under one layout is loaded under another, bit for bit, and training goes on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import (
    DISTRIBUTED_OPTIMIZER,
    EP2,
    PP2,
    TP2,
    short_plan,
    weights_by_name,
)

if TYPE_CHECKING:
    import torch

BF16 = ["train.precision=bf16"]
SINGLE_ROWS = ["train.micro_batch_size=1"]
CP2 = ["parallel.context_parallel_size=2"]
PP2_VPP2 = [*PP2, "parallel.virtual_pipeline_model_parallel_size=2"]
LAYOUTS = {
    "one": (1, []),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "pp2_vpp2": (2, PP2_VPP2),
    "ep2": (2, EP2),
    "etp2": (2, ["parallel.expert_tensor_parallel_size=2"]),
    "cp2": (2, CP2),
    "dp2": (2, []),
    "dp2_sharded": (2, DISTRIBUTED_OPTIMIZER),
    "dp4_sharded": (4, [*SINGLE_ROWS, *DISTRIBUTED_OPTIMIZER]),
    "tp2_ep2": (2, [*TP2, *EP2]),
    "tp2_pp2_ep2_sharded": (4, [*TP2, *PP2, *EP2, *DISTRIBUTED_OPTIMIZER]),
    "one_bf16": (1, BF16),
    "dp2_sharded_bf16": (2, [*BF16, *DISTRIBUTED_OPTIMIZER]),
    "ep2_sharded_bf16": (2, [*BF16, *EP2, *DISTRIBUTED_OPTIMIZER]),
}
PAIRS = [
    ("one", "tp2"),
    ("tp2", "one"),
    ("one", "tp2_pp2_ep2_sharded"),
    ("pp2", "ep2"),
    ("pp2_vpp2", "one"),
    ("pp2_vpp2", "tp2_ep2"),
    ("ep2", "one"),
    ("ep2", "pp2_vpp2"),
    ("cp2", "tp2"),
    ("etp2", "ep2"),
    ("dp2", "dp2_sharded"),
    ("dp2_sharded", "one"),
    ("dp4_sharded", "dp2_sharded"),
    ("tp2_pp2_ep2_sharded", "dp4_sharded"),
    ("one_bf16", "dp2_sharded_bf16"),
    ("dp2_sharded_bf16", "ep2_sharded_bf16"),
    ("ep2_sharded_bf16", "one_bf16"),
]
TWO_DEPTHS = ["model.mtp_num_layers=2"]
SAVED_STEP = 2
LOSS_TOLERANCE = 1e-6
"""Relative, fp32: layouts add in another order."""
BF16_LOSS_TOLERANCE = 2e-3
"""Relative: layouts round to bf16 at other places; see test_bf16."""


@dataclass(frozen=True)
class Next:
    """What a run reads and finds in the step after a checkpoint."""

    rows: dict[int, list[int]]
    """Token ids by sample index."""
    loss: float


def train_and_save(run_dir: Path, overrides: list[str]) -> Next:
    """Train until the step that is saved and one further."""
    from ring_train.checkpoint import TrainState
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer

    plan = short_plan([*TWO_DEPTHS, *overrides, f"run_dir={run_dir}"])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        for step in range(SAVED_STEP):
            train_on(plan, model, optimizer, groups, step)
        checkpoints = Checkpointer(plan, groups.collection)
        samples = SAVED_STEP * plan.batch.global_batch_size
        state = TrainState(step=SAVED_STEP, consumed_samples=samples)
        checkpoints.save(state, model, optimizer)
        found = train_on(plan, model, optimizer, groups, SAVED_STEP)
        checkpoints.finish()
        return found


def resume(run_dir: Path, overrides: list[str]) -> Next:
    """Restore another model, save what was restored as the step after, and train on."""
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer

    plan = short_plan([*TWO_DEPTHS, *overrides, "seed=1", f"run_dir={run_dir}"])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        checkpoints = Checkpointer(plan, groups.collection)
        state = checkpoints.restore_or_init(model, optimizer)
        assert state.step == SAVED_STEP
        assert state.consumed_samples == SAVED_STEP * plan.batch.global_batch_size
        checkpoints.save(replace(state, step=SAVED_STEP + 1), model, optimizer)
        found = train_on(plan, model, optimizer, groups, state.step)
        checkpoints.finish()
        return found


def train_on(plan: Any, model: Any, optimizer: Any, groups: Any, step: int) -> Next:
    """Run a step."""
    from ring_train.train.step import train_step
    from tests.parallel.streams import make_micro_batches

    batches = make_micro_batches(plan, step, groups.dp_rank)
    result = train_step(
        plan, model, optimizer, batches, groups.collection, step=step, num_domains=1
    )
    rows: dict[int, list[int]] = {}
    for index, batch in enumerate(batches):
        first = step * plan.batch.global_batch_size
        first += (index * plan.mesh.dp + groups.dp_rank) * plan.batch.micro_batch_size
        for number, ids in enumerate(batch.tokens.split(plan.batch.seq_length)):
            rows[first + number] = ids.tolist()
    return Next(rows, float(result.sums.lm_loss))


def digests(run_dir: Path, step: int) -> dict[str, str]:
    from ring_train.checkpoint.folders import step_path
    from ring_train.checkpoint.manifest import read_manifest
    from ring_train.checkpoint.reading import tensor_digests

    folder = step_path(run_dir / "checkpoints", step)
    return tensor_digests(folder, read_manifest(folder))


def all_rows(parts: list[Next]) -> dict[int, list[int]]:
    return {sample: ids for part in parts for sample, ids in part.rows.items()}


@pytest.fixture(scope="module")
def saved() -> dict[str, tuple[Path, list[Next]]]:
    """By layout: the run folder, and what came next on each rank."""
    return {}


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_what_one_layout_saves_another_continues(
    first: str,
    second: str,
    saved: dict[str, tuple[Path, list[Next]]],
    on_ranks: OnRanks,
    tmp_path: Path,
) -> None:
    if first not in saved:
        ranks, overrides = LAYOUTS[first]
        saved[first] = tmp_path, on_ranks(ranks, train_and_save, tmp_path, overrides)
    folder, expected = saved[first]
    ranks, overrides = LAYOUTS[second]
    shutil.copytree(folder / "checkpoints", tmp_path / "resumed" / "checkpoints")
    found = on_ranks(ranks, resume, tmp_path / "resumed", overrides)
    before = digests(folder, SAVED_STEP)
    kinds = {"weight", "exp_avg", "exp_avg_sq", "rng"} | ({"master"} if "bf16" in first else set())
    assert {key.split("/")[0] for key in before} == kinds
    assert digests(tmp_path / "resumed", SAVED_STEP + 1) == before
    assert all_rows(found) == all_rows(expected)
    tolerance = BF16_LOSS_TOLERANCE if "bf16" in first else LOSS_TOLERANCE
    assert [part.loss for part in found] == pytest.approx(
        [expected[0].loss] * len(found), rel=tolerance, abs=0
    )


def save_weights(run_dir: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Train one step, so that expert biases differ too, and save; return the weights."""
    from ring_train.checkpoint import TrainState
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer

    plan = short_plan([*TWO_DEPTHS, *overrides, f"run_dir={run_dir}"])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        train_on(plan, model, optimizer, groups, 0)
        checkpoints = Checkpointer(plan, groups.collection)
        checkpoints.save(TrainState(step=1), model, optimizer)
        checkpoints.finish()
        return weights_by_name(model)


def load(run_dir: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Load the weights into a model of another seed; return them."""
    from ring_train.checkpoint.checkpointer import load_weights
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime

    plan = short_plan([*TWO_DEPTHS, *overrides, "seed=1"])
    folder = run_dir / "checkpoints" / "step_00000001"
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        load_weights(folder, model, plan, groups.collection)
        return weights_by_name(model)


@pytest.mark.parametrize("layout", ["pp2_vpp2", "tp2_pp2_ep2_sharded"])
def test_weights_of_a_layout_load_on_one_rank_and_back(
    layout: str, on_ranks: OnRanks, tmp_path: Path
) -> None:
    ranks, overrides = LAYOUTS[layout]
    parts = on_ranks(ranks, save_weights, tmp_path, overrides)
    whole = on_ranks(1, load, tmp_path, [])[0]
    for part in [*parts, *on_ranks(ranks, load, tmp_path, overrides)]:
        assert not [name for name, weight in part.items() if not weight.equal(whole[name])]
    assert set().union(*parts) == whole.keys()
    assert any(weight.any() for name, weight in whole.items() if name.endswith("expert_bias"))


def test_weights_of_another_precision_are_converted(on_ranks: OnRanks, tmp_path: Path) -> None:
    rounded = on_ranks(1, save_weights, tmp_path, BF16)[0]
    loaded = on_ranks(1, load, tmp_path, [])[0]
    assert {
        name: weight.float().equal(loaded[name]) for name, weight in rounded.items()
    } == dict.fromkeys(loaded, True)
