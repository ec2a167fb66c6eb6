"""Short runs with adapters for rank tests.

Imports of torch and megatron sit in functions, so that collecting the tests is cheap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from tests.parallel.short_runs import short_plan

if TYPE_CHECKING:
    import torch

    from ring_train.plan import Plan

LORA = [
    "lora=all",
    "lora.rank=4",
    "lora.alpha=12",
    "init_from=unread",
    "model.moe_router_bias_update_rate=0",
    "model.mtp_num_layers=2",
    "train.micro_batch_size=1",
]
"""Adapters on everything; tests that load no weights put adapters on the drawn ones."""
B_STD = 0.05
"""Of B where it must not be zero, because A would have no gradient."""

NUM_UPDATES = 2


def lora_plan(overrides: Sequence[str]) -> Plan:
    """Return the plan of a short run with adapters for the world of this rank."""
    return short_plan([*LORA, *overrides])


def draw_b(chunks: Iterable[torch.nn.Module]) -> None:
    """Give every B values that do not depend on the layout."""
    import hashlib

    import torch

    from ring_train.model.tensors import local_tensors

    for item in local_tensors(chunks):
        if item.name.endswith("lora_b"):
            seed = int.from_bytes(hashlib.sha256(item.name.encode()).digest()[:7], "little")
            full = torch.empty(item.full_shape)
            full.normal_(0.0, B_STD, generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                item.tensor.copy_(item.shard.of(full))


def adapter_gradients(overrides: Sequence[str]) -> dict[str, Any]:
    """Return losses and {"gradients": {logical name: full tensor}} of one step on a drawn model."""
    import torch

    from ring_train.model.build import build_model
    from ring_train.model.router import routers
    from ring_train.model.tensors import local_tensors
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import attach_schedule_callbacks
    from ring_train.train.step import forward_backward
    from tests.parallel.streams import make_micro_batches

    plan = lora_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        draw_b(model)
        attach_schedule_callbacks(model, None, groups.collection)
        for router in routers(model):
            router.track_margin = True
        for chunk in model:
            chunk.zero_grad_buffer()
        rows = make_micro_batches(plan, 0, groups.dp_rank)
        depths = plan.layers.num_mtp
        weights = [1.0, *[0.05] * depths]
        sums = forward_backward(model, rows, groups.collection, num_domains=1, loss_weights=weights)
        gradients = {}
        for item in local_tensors(model):
            if item.owner.requires_grad:
                gradients[item.name] = item.shard.gather(item.gradient).clone()
        return {
            "losses": [float(sums.lm_loss), *sums.mtp_means().tolist()],
            "margin": min((router.margin for router in routers(model)), default=torch.inf),
            "gradients": gradients,
            "names": {item.name for item in local_tensors(model)},
        }


def adapter_update(overrides: Sequence[str]) -> dict[str, Any]:
    """Return what updates of a drawn model do: losses, norms, and which tensors moved how far.

    `moved` is {logical name: full difference} of every tensor that is not bit for bit what it was.
    """
    import torch

    from ring_train.model.build import build_model
    from ring_train.model.tensors import local_tensors
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer, gather_parameters
    from ring_train.train.step import train_step
    from tests.parallel.streams import make_micro_batches

    plan = lora_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        draw_b(model)
        optimizer = build_optimizer(plan, model, groups.collection)
        before = {item.name: item.tensor.detach().clone() for item in local_tensors(model)}
        losses, norms = [], []
        for step in range(NUM_UPDATES):
            rows = make_micro_batches(plan, step, groups.dp_rank)
            result = train_step(
                plan, model, optimizer, rows, groups.collection, step=step, num_domains=1
            )
            losses.append(float(result.sums.lm_loss))
            norms.append(result.grad_norm)
        gather_parameters(model)
        moved = {
            item.name: item.shard.gather(item.tensor.detach() - before[item.name])
            for item in local_tensors(model)
            if not torch.equal(before[item.name], item.tensor)
        }
        return {"losses": losses, "norms": norms, "moved": moved}
