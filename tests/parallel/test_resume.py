"""A run that stops after any step and resumes is the uninterrupted run, bit for bit."""

import hashlib
from pathlib import Path

import pytest

from ring_train.config import compose
from tests.conftest import OnRanks
from tests.parallel.test_training_layouts import SHORT_RUN

NUM_STEPS = 10


def run_segment(run_dir: Path, until: int, overrides: list[str]) -> dict[str, object]:
    """Resume the run folder, train until a step, save; return figures and a digest of the state."""
    import torch
    import torch.distributed as dist

    from ring_train.checkpoint import Checkpointer, TrainState
    from ring_train.model.build import build_model
    from ring_train.model.tensors import local_tensors
    from ring_train.plan import make_plan
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step
    from tests.parallel.streams import make_micro_batches

    config = compose("pretrain", ["model=tiny", *SHORT_RUN, f"run_dir={run_dir}", *overrides])
    plan = make_plan(config, dist.get_world_size())
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        checkpoints = Checkpointer(plan, groups.collection)
        state = checkpoints.restore_or_init(model, optimizer)
        figures = {}
        for step in range(state.step, until):
            rows = make_micro_batches(plan, step, groups.dp_rank)
            result = train_step(
                plan, model, optimizer, rows, groups.collection, step=step, num_domains=2
            )
            figures[step] = (float(result.sums.lm_loss), result.grad_norm)
        checkpoints.save(TrainState(until, until * 4), model, optimizer)
        digest = hashlib.sha256()
        for item in local_tensors(model):
            digest.update(item.tensor.detach().numpy().tobytes())
        moments = [
            value
            for part in optimizer.chained_optimizers
            for states in part.optimizer.state.values()
            for value in states.values()
            if isinstance(value, torch.Tensor)
        ]
        for moment in moments:
            digest.update(moment.numpy().tobytes())
        assert moments
        return {"figures": figures, "digest": digest.hexdigest()}


def run_in_one_piece(run_dir: Path, overrides: list[str]) -> list[dict[str, object]]:
    """Return what every step of one uninterrupted process leaves."""
    return [run_segment(run_dir, step, overrides) for step in range(1, NUM_STEPS + 1)]


def test_a_stop_after_any_step_changes_nothing(on_ranks: OnRanks, tmp_path: Path) -> None:
    whole = on_ranks(1, run_segment, tmp_path / "whole", NUM_STEPS, [], timeout_s=120)[0]
    for step in range(1, NUM_STEPS):
        run_dir = tmp_path / f"stop_after_{step}"
        first = on_ranks(1, run_segment, run_dir, step, [])[0]
        second = on_ranks(1, run_segment, run_dir, NUM_STEPS, [])[0]
        assert {**first["figures"], **second["figures"]} == whole["figures"], step
        assert second["digest"] == whole["digest"], step


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tensor_model_parallel_size=2"],
        ["parallel.pipeline_model_parallel_size=2"],
        ["parallel.expert_model_parallel_size=2"],
        ["parallel.use_distributed_optimizer=true"],
    ],
    ids=lambda overrides: overrides[0].split(".")[1],
)
def test_resume_on_two_ranks_is_bit_equal(
    overrides: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    whole = on_ranks(2, run_segment, tmp_path / "whole", 4, overrides, timeout_s=120)
    first = on_ranks(2, run_segment, tmp_path / "cut", 2, overrides, timeout_s=120)
    second = on_ranks(2, run_segment, tmp_path / "cut", 4, overrides, timeout_s=120)
    for before, after, reference in zip(first, second, whole, strict=True):
        assert {**before["figures"], **after["figures"]} == reference["figures"]
        assert after["digest"] == reference["digest"]
