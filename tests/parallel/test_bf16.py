"""Training in bf16: what stays in fp32, and losses near those of fp32."""

import math
from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import DISTRIBUTED_OPTIMIZER, EP2, TP2, short_plan
from tests.parallel.test_training_layouts import train

NUM_STEPS = 8
LOSS_TOLERANCE = 0.05
"""bf16 keeps 8 bits: each of some 20 roundings of the residual stream moves a loss of 6 nats by up
to 2^-9 of it, at random, and a rounded score may choose another expert. Seen: 0.02."""
BF16 = ["train.precision=bf16"]
LAYOUTS = {
    "one_rank": (1, []),
    "dp2": (2, []),
    "dp2_distributed_optimizer": (2, DISTRIBUTED_OPTIMIZER),
    "tp2_sp": (2, TP2),
    "ep2": (2, EP2),
}


@pytest.fixture(scope="module")
def fp32() -> dict[str, list[float]]:
    return {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_decrease_close_to_those_of_fp32(
    layout: str, fp32: dict[str, list[float]], on_ranks: OnRanks
) -> None:
    if not fp32:
        fp32.update(on_ranks(1, train, [], NUM_STEPS)[0])
    ranks, overrides = LAYOUTS[layout]
    for figures in on_ranks(ranks, train, [*BF16, *overrides], NUM_STEPS):
        assert all(map(math.isfinite, figures["lm"] + figures["mtp"] + figures["grad_norm"]))
        assert figures["lm"][-1] < figures["lm"][0] - 0.3
        assert figures["lm"] != fp32["lm"], "nothing was rounded"
        for key in ("lm", "mtp"):
            assert figures[key] == pytest.approx(fp32[key], abs=LOSS_TOLERANCE, rel=0), key


def precisions(overrides: list[str]) -> dict[str, Any]:
    """Train two steps; return dtypes and how parameters relate to their masters."""
    import torch

    from ring_train.model.build import build_model
    from ring_train.model.router import routers
    from ring_train.model.tensors import local_tensors
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step
    from tests.parallel.streams import make_micro_batches

    plan = short_plan([*BF16, *overrides])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer: Any = build_optimizer(plan, model, groups.collection)
        for step in range(2):
            rows = make_micro_batches(plan, step, groups.dp_rank)
            train_step(plan, model, optimizer, rows, groups.collection, step=step, num_domains=1)
        parameters = [item for item in local_tensors(model) if item.is_parameter]
        parts = optimizer.chained_optimizers
        masters = [p for part in parts for group in part.param_groups for p in group["params"]]
        states = [state for part in parts for state in part.optimizer.state.values()]
        rounded = torch.cat([master.detach().bfloat16().flatten() for master in masters])
        held = torch.cat([item.tensor.detach().flatten() for item in parameters])
        return {
            "parameters": {item.tensor.dtype for item in parameters},
            "gradients": {item.gradient.dtype for item in parameters},
            "masters": {master.dtype for master in masters},
            "moments": {state[key].dtype for state in states for key in ("exp_avg", "exp_avg_sq")},
            "expert_bias": {router.expert_bias.dtype for router in routers(model)},
            "sorted_values_are_equal": bool(rounded.sort().values.equal(held.sort().values)),
            "masters_are_finer": any(not m.equal(m.bfloat16().float()) for m in masters),
            "bias_is_finer": not all(
                r.expert_bias.equal(r.expert_bias.bfloat16().float()) for r in routers(model)
            ),
            "num_masters": sum(master.numel() for master in masters),
            "num_parameters": sum(item.tensor.numel() for item in parameters),
        }


def test_parameters_are_bf16_and_what_is_accumulated_is_fp32(on_ranks: OnRanks) -> None:
    import torch

    single = on_ranks(1, precisions, [])[0]
    assert single["sorted_values_are_equal"], "parameters are their masters, rounded"
    assert single["num_masters"] == single["num_parameters"]
    sharded = on_ranks(2, precisions, DISTRIBUTED_OPTIMIZER)
    assert sum(part["num_masters"] for part in sharded) == single["num_parameters"]
    for part in (single, *sharded):
        assert part["parameters"] == {torch.bfloat16}
        for key in ("gradients", "masters", "moments", "expert_bias"):
            assert part[key] == {torch.float32}, key
        assert part["masters_are_finer"]
        assert part["bias_is_finer"]
