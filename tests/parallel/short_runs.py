"""Short runs of the tiny model for rank tests: their plan, and tensors by logical name.

Imports of torch and megatron sit in functions, so that collecting the tests is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ring_train.config import compose
from ring_train.plan import Plan, make_plan

if TYPE_CHECKING:
    import torch

    from ring_train.data.batch import Batch
    from ring_train.runtime.distributed import Groups
    from ring_train.train.step import LossSums

    Tensors = Mapping[str, torch.Tensor]

NUM_STEPS = 20
SHORT_RUN = [
    "model=tiny",
    "train.precision=fp32",
    "train.seq_length=16",
    "train.micro_batch_size=2",
    "train.global_batch_size=4",
    f"train.num_steps={NUM_STEPS}",
    "train.eval_interval_steps=0",
    "optim.lr=1e-3",
    "optim.lr_warmup_steps=2",
    "optim.wsd_decay_steps=5",
    "model.init_method_std=0.05",
    "seed=36",
]
"""The seed gives a well-conditioned run: its routing margins stay above 4e-5, and no document
begins with a token whose q k^T is tiny in both heads of a norm group, which the group norm of
lightning attention would blow up, rounding errors included (with other seeds 1e-4 in a loss)."""
FIRST_GENERATION = [
    "model=tiny_v1",
    "model.moe_z_loss_coeff=0.3",
    "model.moe_aux_loss_coeff=3.0",
]
"""Softmax router, norm_head, both router losses large enough to see; after SHORT_RUN."""
TP2 = ["parallel.tensor_model_parallel_size=2"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
EP2 = ["parallel.expert_model_parallel_size=2"]
DISTRIBUTED_OPTIMIZER = ["parallel.use_distributed_optimizer=true"]


def short_plan(overrides: Sequence[str]) -> Plan:
    """Return the plan of a short run for the world of this rank."""
    import torch.distributed as dist

    return make_plan(compose("pretrain", [*SHORT_RUN, *overrides]), dist.get_world_size())


def weights_by_name(model: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Return {logical name: full tensor} of what this rank holds a part of. Collective."""
    from ring_train.model.tensors import local_tensors

    return {
        item.name: item.shard.gather(item.tensor.detach()).clone() for item in local_tensors(model)
    }


def gradients_by_name(
    overrides: Sequence[str],
    *,
    step: int = 0,
    pad_to_multiple: int = 1,
    after_step: int | None = None,
) -> dict[str, Any]:
    """Return losses, expert counts and {"gradients": {logical name: full tensor}} of one step.

    Both copies of the embedding must hold the gradient of the whole, so a rank reports either.

    Args:
        overrides: of the short run; no distributed optimizer, which leaves sums incomplete.
        step: which step's rows.
        pad_to_multiple: the rows are padded to a multiple of this many tokens.
        after_step: a step that is run before and updates the routers alone.
    """
    import torch

    from ring_train.model.build import build_model
    from ring_train.model.router import routers
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import attach_schedule_callbacks
    from ring_train.train.step import forward_backward
    from tests.parallel.streams import make_micro_batches

    plan = short_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        attach_schedule_callbacks(model, None, groups.collection)
        for router in routers(model):
            router.track_margin = True
        depths = plan.layers.num_mtp
        factor = plan.config.model.mtp_loss_scaling_factor / max(depths, 1)

        def run(step: int) -> LossSums:
            for chunk in model:
                chunk.zero_grad_buffer()
            return forward_backward(
                model,
                make_micro_batches(plan, step, groups.dp_rank, pad_to_multiple=pad_to_multiple),
                groups.collection,
                num_domains=1,
                loss_weights=[1.0, *[factor] * depths],
            )

        if after_step is not None:
            run(after_step)
            _loads(plan, model, groups)
        sums = run(step)
        return {
            "losses": [float(sums.lm_loss), *sums.mtp_means().tolist()],
            "margin": min((router.margin for router in routers(model)), default=torch.inf),
            "gradients": _gradients(model),
            "loads": _loads(plan, model, groups),
        }


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return {logical name: full gradient} of what this rank holds a part of. Collective."""
    from ring_train.model.tensors import local_tensors

    gradients = {}
    for item in local_tensors(model):
        if item.is_parameter:
            gradients[item.name] = item.shard.gather(item.gradient).clone()
    return gradients


def _loads(plan: Plan, model: Any, groups: Groups) -> dict[int, tuple[list[int], float, float]]:
    """Return {layer number: (tokens per expert, z-loss, balance loss or 0)} of this stage."""
    from ring_train.model.router import finish_router_step

    loads = finish_router_step(
        model, groups.collection, plan.config.model.moe_router_bias_update_rate
    )
    return {
        number: (load.counts.tolist(), float(load.z_loss), float(load.balance_loss or 0.0))
        for number, load in loads.items()
    }


def relative_errors(tensors: Tensors, reference: Tensors) -> dict[str, float]:
    """Return {name: |x - reference| / |reference|} in L2 norms, largest first."""
    errors = {
        name: float((tensor.double() - reference[name].double()).norm() / reference[name].norm())
        for name, tensor in tensors.items()
    }
    assert not any(map(math.isnan, errors.values())), f"NaN in {errors}"
    return dict(sorted(errors.items(), key=lambda item: -item[1]))


class SyntheticBatches:
    """Stands in for `ring_train.data.loader.Batches`: two domains, no validation."""

    domains = ("even", "odd")

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def batch(self, step: int, micro_batch: int, dp_rank: int) -> Batch:
        """Return one micro batch."""
        from tests.parallel.streams import make_micro_batches

        return make_micro_batches(self.plan, step, dp_rank)[micro_batch]

    def validation(self, domain: str, dp_rank: int, step: int) -> list[Batch]:
        """Return nothing."""
        return []

    def mixture_record(self) -> list[dict[str, object]]:
        """Return nothing to compare."""
        return []
