"""A run that stops and resumes is the uninterrupted run, bit for bit: metrics, weights, moments."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import (
    DISTRIBUTED_OPTIMIZER,
    EP2,
    PP2,
    TP2,
    SyntheticBatches,
    short_plan,
)

NUM_STEPS = 10
BF16 = ["train.precision=bf16"]
LAYOUTS = {
    "tp2_sp": (2, TP2),
    "pp2": (2, PP2),
    "ep2": (2, EP2),
    "dp2_distributed_optimizer": (2, DISTRIBUTED_OPTIMIZER),
    "ep2_distributed_optimizer_bf16": (2, [*EP2, *DISTRIBUTED_OPTIMIZER, *BF16]),
    "bf16": (1, BF16),
}


def run_until(run_dir: Path, stop: int, overrides: list[str]) -> dict[str, str]:
    """Resume the run folder from nothing but its files, train until a step, save.

    Returns what every step so far has logged, and digests of the state after the last one.
    """
    from ring_train.checkpoint import Checkpointer
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.loop import Trainer
    from ring_train.train.optimizer import build_optimizer

    logs = ["logging.interval_steps=1", "logging.tensorboard=false"]
    run = [f"run_dir={run_dir}", f"train.stop_after_step={stop}"]
    plan = short_plan([*overrides, *logs, *run])
    run_dir.mkdir(exist_ok=True)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        checkpoints = Checkpointer(plan, groups.collection)
        state = checkpoints.restore_or_init(model, optimizer)
        batches: Any = SyntheticBatches(plan)
        trainer = Trainer(plan, model, optimizer, batches, checkpoints, groups)
        assert trainer.train(state).step == stop
        return {
            "metrics": (run_dir / "metrics.jsonl").read_text() if groups.rank == 0 else "",
            **digests(model, optimizer),
        }


def digests(model: Any, optimizer: Any) -> dict[str, str]:
    """Return digests of all weights, expert biases, fp32 masters and moments of this rank."""
    import torch

    from ring_train.model.tensors import local_tensors

    parts = optimizer.chained_optimizers
    masters = [p for part in parts for group in part.param_groups for p in group["params"]]
    states = [state for part in parts for state in part.optimizer.state.values()]
    moments = [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
    assert len(moments) == 2 * len(masters) > 0
    assert {x.dtype for x in moments + masters} == {torch.float32}
    return {
        "weights": digest(item.tensor for item in local_tensors(model)),
        "masters": digest(masters),
        "moments": digest(moments),
    }


def digest(tensors: Any) -> str:
    import torch

    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def run_in_pieces(run_dir: Path) -> list[dict[str, str]]:
    """Stop after every step; return what each of the runs leaves."""
    return [run_until(run_dir, stop, []) for stop in range(1, NUM_STEPS + 1)]


def test_a_stop_after_every_step_changes_nothing(on_ranks: OnRanks, tmp_path: Path) -> None:
    pieces = on_ranks(1, run_in_pieces, tmp_path / "pieces")[0]
    whole = on_ranks(1, run_until, tmp_path / "whole", NUM_STEPS, [])[0]
    assert pieces[-1] == whole
    assert whole["metrics"].count("\n") == NUM_STEPS
    assert len({piece["weights"] for piece in pieces}) == NUM_STEPS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resume_is_bit_equal_under_every_layout(
    layout: str, on_ranks: OnRanks, tmp_path: Path
) -> None:
    ranks, overrides = LAYOUTS[layout]
    whole = on_ranks(ranks, run_until, tmp_path / "whole", 4, overrides)
    on_ranks(ranks, run_until, tmp_path / "cut", 2, overrides)
    assert on_ranks(ranks, run_until, tmp_path / "cut", 4, overrides) == whole
