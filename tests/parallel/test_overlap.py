"""Overlapped reduction and gathering change no bit of a run: they only start messages earlier."""

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
from tests.parallel.test_gradients import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from tests.parallel.test_training_layouts import train

BASE = ["model.mtp_num_layers=2", "train.micro_batch_size=1", "optim.clip_grad=0"]
"""Without clipping, because the gradient norm is added up bucket by bucket."""
REDUCE = ["parallel.overlap_grad_reduce=true"]
GATHER = [*REDUCE, *DISTRIBUTED_OPTIMIZER, "parallel.overlap_param_gather=true"]
VPP2 = ["parallel.virtual_pipeline_model_parallel_size=2"]
ETP2 = ["parallel.expert_tensor_parallel_size=2"]
FULL = ["parallel.recompute_granularity=full", "parallel.recompute_method=uniform"]
FULL += ["parallel.recompute_num_layers=1"]
BUCKET_SIZE = 20_000
"""Parameters: the tiny model fills about twenty such buckets, of the default size not one."""
NUM_STEPS = 3
"""megatron learns in the first step when a bucket is full, and overlaps from the second on."""
NORM_TOLERANCE = 1e-6
"""Relative: the squares are added up in fp32, in the order of the buckets."""
LAYOUTS = {
    "dp2_reduce": (2, [], REDUCE),
    "dp2_gather": (2, DISTRIBUTED_OPTIMIZER, GATHER),
    "dp2_gather_recomputed": (2, [*DISTRIBUTED_OPTIMIZER, *FULL], [*GATHER, *FULL]),
    "ep2_gather": (2, [*EP2, *DISTRIBUTED_OPTIMIZER], [*EP2, *GATHER]),
    "pp2_dp2_gather": (4, [*PP2, *DISTRIBUTED_OPTIMIZER], [*PP2, *GATHER]),
    "pp2_vpp2_dp2_gather": (
        *(4, [*PP2, *VPP2, *DISTRIBUTED_OPTIMIZER]),
        [*PP2, *VPP2, *GATHER],
    ),
    "tp2_etp2_dp2_reduce": (4, [*TP2, *ETP2], [*TP2, *ETP2, *REDUCE]),
}
"""(ranks, overrides without overlap, with it). Gradients are sums over two ranks: gloo adds up more
of them in an order that depends on the size of the bucket."""


@pytest.fixture(autouse=True)
def small_buckets(warm_megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients and parameters of the tiny model travel in many buckets, here and in the forks."""
    from ring_train.model import build

    original = build.make_ddp_config

    def make_ddp_config(plan: Any) -> Any:
        config = original(plan)
        config.bucket_size = BUCKET_SIZE
        return config

    monkeypatch.setattr(build, "make_ddp_config", make_ddp_config)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_bit_equal(layout: str, on_ranks: OnRanks) -> None:
    ranks, plain, overlapped = LAYOUTS[layout]
    expected = on_ranks(ranks, train, [*BASE, *plain], NUM_STEPS)
    results = on_ranks(ranks, train, [*BASE, *overlapped], NUM_STEPS)
    for found, figures in zip(results, expected, strict=True):
        norms = pytest.approx(figures.pop("grad_norm"), rel=NORM_TOLERANCE)
        assert found.pop("grad_norm") == norms
        assert found == figures


def test_overlapped_gradients_are_plain_sums(fp64: None, on_ranks: OnRanks) -> None:
    reference = on_ranks(1, gradients_by_name, BASE)[0]
    for result in on_ranks(4, gradients_by_name, [*BASE, *PP2, *VPP2, *REDUCE]):
        assert result["losses"] == pytest.approx(reference["losses"], abs=LOSS_TOLERANCE, rel=0)
        errors = relative_errors(result["gradients"], reference["gradients"])
        assert not {n: error for n, error in errors.items() if error > GRADIENT_TOLERANCE}


def parameters_after_a_step(overrides: list[str], gather: bool) -> dict[str, Any]:
    """Return the parameters by name after two steps, and the number of buckets."""
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer, gather_parameters
    from ring_train.train.step import train_step
    from tests.parallel.short_runs import weights_by_name
    from tests.parallel.streams import make_micro_batches

    plan = short_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        for step in range(2):
            rows = make_micro_batches(plan, step, groups.dp_rank)
            train_step(plan, model, optimizer, rows, groups.collection, step=step, num_domains=1)
        if gather:
            gather_parameters(model)
        return {"weights": weights_by_name(model), "buckets": len(model[0].bucket_groups)}


def test_parameters_are_whole_once_gathered_and_not_before(on_ranks: OnRanks) -> None:
    overlapped = [*BASE, *GATHER]
    expected = on_ranks(2, parameters_after_a_step, [*BASE, *DISTRIBUTED_OPTIMIZER], True)[0]
    gathered = on_ranks(2, parameters_after_a_step, overlapped, True)
    assert all(result["buckets"] > 3 for result in gathered)
    for result in gathered:
        assert not differing(result, expected)
    assert any(
        differing(result, expected)
        for result in on_ranks(2, parameters_after_a_step, overlapped, False)
    )


def differing(result: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of the parameters that are not equal bit for bit."""
    weights = expected["weights"]
    return [name for name, weight in result["weights"].items() if not weight.equal(weights[name])]
