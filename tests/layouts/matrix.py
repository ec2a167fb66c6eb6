"""The table of layouts that are compared with one rank, and how one of them is run.

Every kind (set of degrees above 1 that fit into one world) appears four times, with other flags
each time: bare, with one MTP depth; optimizer sharded, communication overlapped, everything
recomputed, two MTP depths, padded rows, compared after an update; optimizer sharded, parts
recomputed, no MTP; and the first generation with what the second has, compared after an update of
weights and routers. The reference of each variant is one rank without any flag. All rows hold
packed documents cut at odd places.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from tests.parallel.short_runs import FIRST_GENERATION, SHORT_RUN

if TYPE_CHECKING:
    import torch

    from ring_train.plan import Plan

KEYS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "cp": "context_parallel_size",
}
DATA = [
    "train.seq_length=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=16",
    "seed=36",
]
SMOOTH_ADAM = ["optim.adam_eps=1", "optim.weight_decay=0"]
VARIANTS = {
    "plain": (["model.mtp_num_layers=1"], 1),
    "full": (["model.mtp_num_layers=2", *SMOOTH_ADAM], 40),
    "selective": (["model.mtp_num_layers=0"], 1),
    "v1": ([*FIRST_GENERATION, *SMOOTH_ADAM], 40),
}
UPDATED = ("full", "v1")
"""Overrides of model and data, and what rows are padded to a multiple of.

With an epsilon far above the gradients Adam's first update is nearly linear in them, so rounding
stays rounding. With the usual one it is their sign.
"""
UPDATE_RATE = 0.1
"""Learning rate of the update: weights move by some percent."""
BUCKET_SIZE = 4096
"""Parameters: the tiny model fills some twenty such buckets, of the default size not one."""
EVERYTHING = [
    "parallel.use_distributed_optimizer=true",
    "parallel.overlap_grad_reduce=true",
    "parallel.overlap_param_gather=true",
    "parallel.recompute_granularity=full",
    "parallel.recompute_method=uniform",
    "parallel.recompute_num_layers=1",
]
FLAGS = {
    "plain": [],
    "full": EVERYTHING,
    "v1": EVERYTHING,
    "selective": [
        "parallel.use_distributed_optimizer=true",
        "parallel.recompute_granularity=selective",
        "parallel.recompute_modules=[core_attn,mlp,moe,shared_experts]",
    ],
}
"""Parallel keys of a variant, on top of the degrees."""


@dataclass(frozen=True)
class Layout:
    """One row of the table."""

    degrees: tuple[tuple[str, int], ...]
    """(degree, size) of every degree above 1, dp included."""
    variant: str

    @property
    def name(self) -> str:
        """What pytest and the table call it."""
        mesh = "_".join(f"{name}{size}" for name, size in self.degrees) or "one_rank"
        return f"{mesh}-{self.variant}"

    @property
    def size(self) -> dict[str, int]:
        """Every degree, 1 where it is not used."""
        return {name: 1 for name in (*KEYS, "dp")} | dict(self.degrees)

    @property
    def num_ranks(self) -> int:
        """Ranks of the world."""
        size = self.size
        return size["tp"] * size["pp"] * size["cp"] * size["dp"]

    @property
    def overrides(self) -> list[str]:
        """The parallel keys."""
        found = [f"parallel.{KEYS[name]}={n}" for name, n in self.degrees if name != "dp"]
        return found + FLAGS[self.variant]


def all_layouts() -> list[Layout]:
    """Return the table: every kind of mesh in every variant, and some of larger degrees."""
    kinds = [*_kinds(), *LARGER]
    layouts = [Layout(kind, variant) for kind in kinds for variant in VARIANTS]
    return layouts + [Layout(kind, "full") for kind in _kinds_with_expert_replicas()]


LARGER = (
    (("cp", 4),),
    (("ep", 4), ("dp", 4)),
    (("pp", 4),),
    (("pp", 2), ("vpp", 2), ("cp", 4)),
    (("ep", 2), ("etp", 2), ("dp", 4)),
    (("cp", 4), ("ep", 4), ("dp", 2)),
)


def _kinds() -> Iterator[tuple[tuple[str, int], ...]]:
    """Yield every set of degrees of size 2 that holds together, smallest worlds first."""
    found = []
    for tp, cp, dp, ep, etp in product((1, 2), repeat=5):
        for pp, vpp in ((1, 1), (2, 1), (2, 2)):
            if (tp * cp * dp) % (ep * etp) == 0:
                sizes = dict(tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, cp=cp, dp=dp)
                kind = tuple((name, size) for name, size in sizes.items() if size > 1)
                found.append((tp * pp * cp * dp, len(kind), kind))
    yield from (kind for _, _, kind in sorted(found))


def _kinds_with_expert_replicas() -> Iterator[tuple[tuple[str, int], ...]]:
    """Yield kinds that have none at size 2, enlarged: data-parallel ranks of the same experts."""
    for kind in _kinds():
        sizes = dict(kind)
        expert_ranks = sizes.get("ep", 1) * sizes.get("etp", 1)
        dense_ranks = sizes.get("tp", 1) * sizes.get("cp", 1) * sizes.get("dp", 1)
        enlarged = next((name for name in ("dp", "cp") if name in sizes), None)
        if expert_ranks == dense_ranks > 1 and enlarged:
            yield tuple((name, 2 * n if name == enlarged else n) for name, n in kind)


def matrix_plan(layout: Layout | None, variant: str, num_ranks: int) -> Plan:
    """Return the plan of a row of the table; of the one-rank reference for None."""
    from ring_train.config import compose
    from ring_train.plan import make_plan

    overrides = [*SHORT_RUN, *DATA, *VARIANTS[variant][0]]
    parallel = [] if layout is None else layout.overrides
    allow = ["parallel.allow_uncertified=true"]
    return make_plan(compose("pretrain", [*overrides, *parallel, *allow]), num_ranks)


def run_layout(layout: Layout | None, variant: str) -> dict[str, Any]:
    """Return losses, gradients by logical name, expert counts and biases of one step."""
    import torch

    from ring_train.model.router import finish_router_step, routers
    from ring_train.model.tensors import local_tensors
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import attach_schedule_callbacks, build_optimizer

    plan = matrix_plan(layout, variant, torch.distributed.get_world_size())
    with start_runtime(plan) as groups:
        model = _build(plan, groups, variant)
        grad_norm = 0.0
        if variant in UPDATED:
            grad_norm = _update(plan, model, groups, variant)
        elif plan.config.parallel.use_distributed_optimizer:
            build_optimizer(plan, model, groups.collection)
        else:
            attach_schedule_callbacks(model, None, groups.collection)
        for router in routers(model):
            router.track_margin = True
        sums = _accumulate(plan, model, groups, variant)
        if plan.config.parallel.use_distributed_optimizer:
            for chunk in model:
                _complete_gradients(chunk)
        gradients, biases = {}, {}
        for item in local_tensors(model):
            if item.is_parameter:
                gradients[item.name] = item.shard.gather(item.gradient).clone()
        rate = plan.config.model.moe_router_bias_update_rate
        loads = finish_router_step(model, groups.collection, rate)
        for item in local_tensors(model):
            if not item.is_parameter:
                biases[item.name] = item.tensor.clone()
        return {
            "losses": [float(sums.lm_loss), *sums.mtp_means().tolist()],
            "grad_norm": grad_norm,
            "margin": min((router.margin for router in routers(model)), default=torch.inf),
            "gradients": gradients,
            "biases": biases,
            "counts": {number: load.counts.tolist() for number, load in loads.items()},
        }


def _accumulate(plan: Plan, model: Any, groups: Any, variant: str) -> Any:
    """Leave the gradients of the first step in the buffers; return its losses."""
    from ring_train.train.step import forward_backward
    from tests.parallel.streams import make_micro_batches

    for chunk in model:
        chunk.zero_grad_buffer()
    rows = make_micro_batches(plan, 0, groups.dp_rank, pad_to_multiple=VARIANTS[variant][1])
    depths = plan.layers.num_mtp
    factor = plan.config.model.mtp_loss_scaling_factor / max(depths, 1)
    return forward_backward(
        model, rows, groups.collection, num_domains=1, loss_weights=[1.0, *[factor] * depths]
    )


def _build(plan: Plan, groups: Any, variant: str) -> Any:
    """Return the model chunks, those that are updated with many buckets."""
    from unittest import mock

    from ring_train.model import build

    original = build.make_ddp_config

    def make_ddp_config(plan: Plan) -> Any:
        config = original(plan)
        config.bucket_size = BUCKET_SIZE if variant in UPDATED else None
        return config

    with mock.patch.object(build, "make_ddp_config", make_ddp_config):
        return build.build_model(plan, groups.collection)


def _update(plan: Plan, model: Any, groups: Any, variant: str) -> float:
    """Make one update, so that what is compared next follows it; return its gradient norm.

    Where there is a balance loss, the routers are updated too: it reads the loads of this step.

    megatron overlaps from the second batch on: in the first it learns which parameters come when,
    and there is nothing to gather yet.
    """
    from ring_train.model.router import finish_router_step
    from ring_train.train.optimizer import build_optimizer, set_learning_rate

    optimizer = build_optimizer(plan, model, groups.collection)
    _accumulate(plan, model, groups, variant)
    set_learning_rate(optimizer, UPDATE_RATE, 0.0)
    outcome: Any = optimizer.step()
    if plan.config.model.moe_aux_loss_coeff:
        finish_router_step(model, groups.collection, 0.0)
    optimizer.zero_grad()
    return float(outcome[1])


def _complete_gradients(chunk: Any) -> None:
    """Give every rank the whole sums, of which the distributed optimizer leaves it a part."""
    import torch

    for bucket_group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:
        group = bucket_group.intra_distributed_optimizer_instance_group
        for bucket in bucket_group.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, own, group=group)


def worst_errors(found: dict[str, Any], reference: dict[str, Any]) -> tuple[float, float, str]:
    """Return (largest relative loss error, largest relative gradient error, its name)."""
    loss = max(
        _finite(abs(ours - one) / abs(one))
        for ours, one in zip(found["losses"], reference["losses"], strict=True)
    )
    errors = {
        name: _relative(gradient, reference["gradients"].get(name))
        for name, gradient in found["gradients"].items()
    }
    name = max(errors, key=lambda key: errors[key])
    return loss, errors[name], name


def _relative(tensor: torch.Tensor, reference: torch.Tensor | None) -> float:
    """Return ||tensor - reference|| / ||reference||, infinite if they cannot be compared."""
    if reference is None or tensor.shape != reference.shape:
        return float("inf")
    return _finite(float((tensor.double() - reference.double()).norm() / reference.double().norm()))


def _finite(error: float) -> float:
    """Return infinity for NaN, which `max` and comparisons would overlook."""
    return float("inf") if math.isnan(error) else error
