"""A run that stops and resumes is the uninterrupted run, bit for bit: metrics and whole state."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import (
    DISTRIBUTED_OPTIMIZER,
    EP2,
    FIRST_GENERATION,
    TP2,
    SyntheticBatches,
    short_plan,
)
from tests.parallel.test_checkpoint_layouts import BF16, CP2, PP2_VPP2, digests

NUM_STEPS = 12
CUT, END = 2, 4
TWELVE_RUNS_S = 240.0
"""On a busy machine; 10 s on a quiet one."""
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
LAYOUTS = {
    "tp2_sp": (2, TP2),
    "pp2_vpp2": (2, PP2_VPP2),
    "cp2": (2, CP2),
    "dp2_distributed_optimizer": (2, DISTRIBUTED_OPTIMIZER),
    "ep2_overlapped_bf16": (2, [*EP2, *DISTRIBUTED_OPTIMIZER, *BF16, *OVERLAP]),
    "bf16": (1, BF16),
    "first_generation_tp2_sp": (2, [*TP2, *FIRST_GENERATION]),
}
EVERY_STEP = ["checkpoint.interval_steps=1", "checkpoint.keep=null"]


def run_until(run_dir: Path, stop: int, overrides: list[str]) -> dict[str, Any]:
    """Resume the run folder from nothing but its files, train until a step, save.

    Returns what every step so far has logged, and digests of the tensors saved last, by kind.
    """
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.resilience.attempt import start_attempt
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.components import Components
    from ring_train.train.loop import Trainer
    from ring_train.train.optimizer import build_optimizer

    logs = ["logging.interval_steps=1", "logging.tensorboard=false"]
    run = [f"run_dir={run_dir}", f"train.stop_after_step={stop}"]
    plan = short_plan([*overrides, *logs, *run])
    run_dir.mkdir(exist_ok=True)
    with start_runtime(plan) as groups, start_attempt(plan, groups) as attempt:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        checkpoints = Checkpointer(plan, groups.collection)
        state = checkpoints.restore_or_init(model, optimizer)
        batches: Any = SyntheticBatches(plan)
        parts = Components(model, optimizer, batches, checkpoints)
        trainer = Trainer(plan, parts, groups, attempt)
        assert trainer.train(state).step == stop
        assert checkpoints.steps()[-1] == stop
        saved = sorted(digests(run_dir, stop).items())
        return {
            "metrics": (run_dir / "metrics.jsonl").read_text() if groups.rank == 0 else "",
            "weights": [entry for entry in saved if entry[0].startswith("weight/")],
            "others": [entry for entry in saved if not entry[0].startswith("weight/")],
        }


def run_in_pieces(run_dir: Path) -> None:
    """Stop after every step."""
    for stop in range(1, NUM_STEPS + 1):
        run_until(run_dir, stop, ["checkpoint.keep=null"])


def state_at(run_dir: Path, step: int) -> dict[str, Any]:
    """Return everything that a checkpoint says of the state of a run."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    return digests(run_dir, step) | json.loads((folder / "train_state.json").read_text())


def test_a_stop_after_every_step_changes_nothing(on_ranks: OnRanks, tmp_path: Path) -> None:
    pieces, whole = tmp_path / "pieces", tmp_path / "whole"
    on_ranks(1, run_in_pieces, pieces, timeout_s=TWELVE_RUNS_S)
    on_ranks(1, run_until, whole, NUM_STEPS, EVERY_STEP)
    states = [state_at(whole, step) for step in range(1, NUM_STEPS + 1)]
    assert [state_at(pieces, step) for step in range(1, NUM_STEPS + 1)] == states
    assert states[0]["step"] == states[0]["optimizer_step"] == 1
    for key in ("weight/decoder.final_layernorm.weight", "exp_avg/output_layer.weight"):
        assert len({state[key] for state in states}) == NUM_STEPS
    metrics = (whole / "metrics.jsonl").read_text()
    assert (pieces / "metrics.jsonl").read_text() == metrics
    assert metrics.count("\n") == NUM_STEPS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_bit_equal_under_every_layout(
    layout: str, on_ranks: OnRanks, tmp_path: Path
) -> None:
    ranks, overrides = LAYOUTS[layout]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    on_ranks(ranks, run_until, whole, END, [*overrides, *EVERY_STEP])
    shutil.copytree(whole, cut)
    for step in range(CUT + 1, END + 1):
        shutil.rmtree(cut / "checkpoints" / f"step_{step:08d}")
    on_ranks(ranks, run_until, cut, END, overrides)
    assert state_at(cut, END) == state_at(whole, END) != state_at(whole, CUT)
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def test_a_balance_loss_that_is_new_starts_from_balanced(on_ranks: OnRanks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (before,) = on_ranks(1, run_until, run, CUT, [*FIRST_GENERATION, "model.moe_aux_loss_coeff=0"])
    assert not any(key.startswith("load/") for key, _ in before["others"])
    (after,) = on_ranks(1, run_until, run, END, FIRST_GENERATION)
    assert sum(key.startswith("load/") for key, _ in after["others"]) == 4
    lines = [json.loads(line) for line in after["metrics"].splitlines()]
    assert ["router/balance_loss" in line for line in lines] == [False] * CUT + [True] * CUT
