"""Uneven and interleaved pipelines: losses, every gradient and a training run match one rank.

Gradients in fp64, for the reasons of test_gradients. The stack has six layers of all kinds, so that
a layer under a wrong number would decay, route or draw its weights differently.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import (
    DISTRIBUTED_OPTIMIZER,
    EP2,
    PP2,
    TP2,
    gradients_by_name,
    relative_errors,
    short_plan,
)
from tests.parallel.test_gradients import GRADIENT_TOLERANCE, LOSS_TOLERANCE, SMALLEST_MARGIN
from tests.parallel.test_resume import run_until, state_at
from tests.parallel.test_training_layouts import FIGURES, reference_run, train
from tests.parallel.test_training_layouts import LOSS_TOLERANCE as TOLERANCE

STACK = [
    "model.num_layers=6",
    "model.layer_group_size=3",
    "model.mtp_num_layers=2",
    "train.micro_batch_size=1",
]
"""Six layers, of which the third and the sixth are softmax; four micro batches on one rank."""
VPP2 = ["parallel.virtual_pipeline_model_parallel_size=2"]
PP4 = ["parallel.pipeline_model_parallel_size=4"]


def by_hand(*counts: int) -> list[str]:
    return [f"parallel.pipeline_layers={list(counts)}".replace(" ", "")]


LAYOUTS = {
    "pp2_by_cost": (2, PP2, None),
    "pp2_by_hand": (2, [*PP2, *by_hand(1, 5)], ((0,), (1, 2, 3, 4, 5))),
    "pp2_head_and_mtp_alone": (2, [*PP2, *by_hand(6, 0)], ((0, 1, 2, 3, 4, 5), ())),
    "pp4_by_hand": (4, [*PP4, *by_hand(2, 1, 3, 0)], ((0, 1), (2,), (3, 4, 5), ())),
    "pp2_vpp2_by_cost": (2, [*PP2, *VPP2], None),
    "pp2_vpp2_by_hand": (2, [*PP2, *VPP2, *by_hand(1, 2, 2, 1)], ((0,), (1, 2), (3, 4), (5,))),
    "pp2_vpp3": (
        *(2, [*PP2, "parallel.virtual_pipeline_model_parallel_size=3", *by_hand(1, 1, 1, 1, 1, 1)]),
        ((0,), (1,), (2,), (3,), (4,), (5,)),
    ),
    "tp2_pp2_vpp2_ep2": (4, [*TP2, *PP2, *VPP2, *EP2], None),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {}


def staged_gradients(overrides: list[str]) -> dict[str, Any]:
    """Return the gradients of a step, and the stages of its plan."""
    return gradients_by_name(overrides) | {"stages": short_plan(overrides).pipeline.stages}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_match_one_rank(
    layout: str, found: dict[str, Any], fp64: None, on_ranks: OnRanks
) -> None:
    if not found:
        found.update(on_ranks(1, gradients_by_name, STACK)[0])
        assert found["margin"] > SMALLEST_MARGIN
    ranks, overrides, stages = LAYOUTS[layout]
    seen: set[str] = set()
    loads: dict[int, Any] = {}
    for result in on_ranks(ranks, staged_gradients, [*STACK, *overrides]):
        assert stages is None or result["stages"] == stages
        assert result["losses"] == pytest.approx(found["losses"], abs=LOSS_TOLERANCE, rel=0)
        errors = relative_errors(result["gradients"], found["gradients"])
        assert not {n: error for n, error in errors.items() if error > GRADIENT_TOLERANCE}
        seen |= result["gradients"].keys()
        loads |= result["loads"]
    assert seen == found["gradients"].keys()
    assert {number: load[0] for number, load in loads.items()} == {
        number: load[0] for number, load in found["loads"].items()
    }


NUM_STEPS = 6
TRAINED = {
    "pp2_uneven": (2, [*PP2, *by_hand(1, 3), *DISTRIBUTED_OPTIMIZER]),
    "pp2_head_and_mtp_alone": (2, [*PP2, *by_hand(4, 0)]),
    "pp2_vpp2": (2, [*PP2, *VPP2, *by_hand(1, 1, 1, 1)]),
    "pp2_vpp2_ep2_dp2_distributed_optimizer": (
        *(4, [*PP2, *VPP2, *EP2, *DISTRIBUTED_OPTIMIZER, "train.micro_batch_size=1"]),
    ),
}


@pytest.fixture(scope="module")
def reference() -> dict[str, list[float]]:
    return {}


@pytest.mark.parametrize("layout", TRAINED)
def test_training_matches_one_rank(
    layout: str, reference: dict[str, list[float]], on_ranks: OnRanks
) -> None:
    expected = reference_run(on_ranks, reference)
    ranks, overrides = TRAINED[layout]
    for figures in on_ranks(ranks, train, overrides, NUM_STEPS):
        for key in FIGURES:
            found = figures[key]
            assert found == pytest.approx(expected[key][:NUM_STEPS], abs=TOLERANCE, rel=0), key


EVERYTHING = [
    *(*PP2, *VPP2, *EP2, *DISTRIBUTED_OPTIMIZER, "train.micro_batch_size=1"),
    *("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"),
    *("parallel.recompute_granularity=full", "parallel.recompute_method=block"),
    "parallel.recompute_num_layers=1",
]
PHASES = ["phases.a.num_steps=2", "phases.b.num_steps=18", "phases.b.rotary_base=50.0"]


def test_a_run_of_interleaved_chunks_logs_what_one_rank_logs(
    on_ranks: OnRanks, tmp_path: Path
) -> None:
    alone, chunks = tmp_path / "alone", tmp_path / "chunks"
    on_ranks(1, run_until, alone, 4, PHASES)
    on_ranks(4, run_until, chunks, 4, [*PHASES, *EVERYTHING])
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (alone, chunks)]
    records = [[json.loads(line) for line in run] for run in lines]
    assert len(records[0]) == 4
    assert {"router_layer/max_over_mean/4", "router_layer/max_over_mean/5"} <= records[0][0].keys()
    for expected, found in zip(*records, strict=True):
        assert found == pytest.approx(expected, abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_of_interleaved_chunks_resumes_bit_equal(
    precision: str, on_ranks: OnRanks, tmp_path: Path
) -> None:
    overrides = [*PHASES, *EVERYTHING, f"train.precision={precision}"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    on_ranks(4, run_until, whole, 3, overrides)
    on_ranks(4, run_until, cut, 1, overrides)
    on_ranks(4, run_until, cut, 3, overrides)
    assert state_at(cut, 3) == state_at(whole, 3) != state_at(cut, 1)
    assert (cut / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()


def losses_around_a_step(overrides: list[str]) -> list[float]:
    """Return the validation loss, the losses of a training step, and the validation loss again."""
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.evaluation import evaluate
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step
    from tests.parallel.short_runs import SyntheticBatches
    from tests.parallel.streams import make_micro_batches

    class HeldOut(SyntheticBatches):
        def validation(self, domain: str, dp_rank: int, step: int) -> list[Any]:
            return make_micro_batches(self.plan, 7, dp_rank) if domain == "even" else []

    plan = short_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        batches: Any = HeldOut(plan)
        rows = make_micro_batches(plan, 0, groups.dp_rank)
        before = evaluate(model, batches, groups, 0)
        result = train_step(plan, model, optimizer, rows, groups.collection, step=9, num_domains=1)
        after = evaluate(model, batches, groups, 0)
        losses = [float(result.sums.lm_loss), *result.sums.mtp_means().tolist()]
        return [before["valid_loss/even"], *losses, after["valid_loss/even"]]


def test_validation_of_interleaved_chunks_matches_one_rank(on_ranks: OnRanks) -> None:
    expected = on_ranks(1, losses_around_a_step, [])[0]
    assert expected[0] - expected[-1] > 0.01, "the step must change the loss"
    for losses in on_ranks(4, losses_around_a_step, EVERYTHING):
        assert losses == pytest.approx(expected, abs=TOLERANCE, rel=0)
