"""Transformer Engine computes what the local path computes, in bf16 and in FP8, on a real GPU.

Every token goes to every expert, so that no rounding can change a choice. Both paths and an fp32
run start from the same weights; what bf16 costs the local path is the measure of what it may cost
Transformer Engine.

Run alone: TRITON_INTERPRET=0 pytest tests/gpu/test_te.py
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ring_train.platform  # noqa: F401  (before the first import of megatron-core)
from tests.parallel.short_runs import relative_errors, short_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None,
        reason="Transformer Engine is not installed, see docs/transformer-engine.md",
    ),
]
needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0),
    reason="blockwise FP8 needs compute capability 9.0",
)

SIZES = [
    "train.seq_length=256",
    "model.hidden_size=256",
    "model.kv_channels=64",
    "model.ffn_hidden_size=512",
    "model.moe_ffn_hidden_size=256",
    "model.moe_shared_expert_intermediate_size=256",
    "model.moe_router_topk=8",
    "model.moe_router_num_groups=null",
    "model.moe_router_group_topk=null",
]
PLAIN = ["kernels=reference"]
SHARED = ["kernels.lightning=torch", "kernels.fused=torch", "kernels.cross_entropy=full"]
BF16 = ["train.precision=bf16"]
ENGINE = [*BF16, "kernels=transformer_engine", *SHARED]
FP8 = [*BF16, "kernels=fp8", *SHARED]
RECOMPUTED = [
    "parallel.recompute_granularity=full",
    "parallel.recompute_method=uniform",
    "parallel.recompute_num_layers=1",
]
RATIO = 2.0
"""Transformer Engine rounds at other places than the local path, not more often."""
FLOOR = 2.0**-8
"""One rounding to bf16: below it a ratio of errors says nothing."""
FP8_LOSS_TOLERANCE = 0.01
"""Relative, of one forward: e4m3 rounds to 2^-4, and products of 256 channels average that out."""
FP8_GRADIENT_TOLERANCE = 0.15
"""Relative, L2: two factors rounded to 2^-4, in each of some ten products one after the other."""
FP8_TRAINED_TOLERANCE = 0.02
"""Relative, of the loss after NUM_STEPS updates."""
NUM_STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """This process is a world of its own."""
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@cache
def step(*overrides: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return the losses and every gradient by logical name, on the CPU, of the first batch."""
    from ring_train.model.build import build_model
    from ring_train.model.tensors import local_tensors
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import attach_schedule_callbacks
    from ring_train.train.step import forward_backward
    from tests.parallel.streams import make_micro_batches

    plan = short_plan([*SIZES, *overrides])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        attach_schedule_callbacks(model, None, groups.collection)
        rows = [row.to(groups.device) for row in make_micro_batches(plan, 0, 0)]
        weights = [1.0, *[0.3] * plan.layers.num_mtp]
        sums = forward_backward(model, rows, groups.collection, num_domains=1, loss_weights=weights)
        losses = [float(sums.lm_loss), *sums.mtp_means().tolist()]
        gradients = {
            item.name: item.gradient.float().cpu()
            for item in local_tensors(model)
            if item.is_parameter
        }
        del model
    gc.collect()
    torch.cuda.empty_cache()
    return losses, gradients


def trained_loss(overrides: list[str]) -> float:
    """Return the loss of the last of NUM_STEPS steps."""
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step
    from tests.parallel.streams import make_micro_batches

    plan = short_plan([*SIZES, *overrides])
    result: Any = None
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        for number in range(NUM_STEPS):
            rows = [row.to(groups.device) for row in make_micro_batches(plan, number, 0)]
            result = train_step(
                plan, model, optimizer, rows, groups.collection, step=number, num_domains=1
            )
        return float(result.sums.lm_loss)


def test_losses_in_bf16_are_as_near_to_fp32_as_the_local_paths() -> None:
    exact, local, engine = (step(*x)[0] for x in (PLAIN, [*PLAIN, *BF16], ENGINE))
    for truth, own, theirs in zip(exact, local, engine, strict=True):
        assert abs(theirs - truth) <= max(RATIO * abs(own - truth), FLOOR * truth)


def test_gradients_in_bf16_are_as_near_to_fp32_as_the_local_paths() -> None:
    exact, local, engine = (step(*x)[1] for x in (PLAIN, [*PLAIN, *BF16], ENGINE))
    assert engine.keys() == local.keys() == exact.keys()
    own, theirs = relative_errors(local, exact), relative_errors(engine, exact)
    worse = {
        name: (error, own[name])
        for name, error in theirs.items()
        if error > max(RATIO * own[name], FLOOR)
    }
    assert not worse


@needs_fp8
def test_losses_in_fp8_are_near_those_in_bf16() -> None:
    assert step(*FP8)[0] == pytest.approx(step(*ENGINE)[0], rel=FP8_LOSS_TOLERANCE, abs=0)
    assert step(*FP8)[0] != step(*ENGINE)[0], "FP8 was not on"


@needs_fp8
def test_gradients_in_fp8_are_near_those_in_bf16() -> None:
    errors = relative_errors(step(*FP8)[1], step(*ENGINE)[1])
    assert not {name: error for name, error in errors.items() if error > FP8_GRADIENT_TOLERANCE}


@needs_fp8
def test_recomputed_layers_give_the_gradients_of_kept_ones() -> None:
    errors = relative_errors(step(*FP8, *RECOMPUTED)[1], step(*FP8)[1])
    assert not {name: error for name, error in errors.items() if error > FLOOR}


@needs_fp8
def test_a_run_in_fp8_learns_as_one_in_bf16_does() -> None:
    assert trained_loss(FP8) == pytest.approx(trained_loss(ENGINE), rel=FP8_TRAINED_TOLERANCE)
