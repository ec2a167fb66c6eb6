"""megatron's optimizer and the callbacks its schedules read off the config."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from ring_train.plan import Plan
from ring_train.plan.megatron import make_optimizer_config


def build_optimizer(
    plan: Plan, model: list[DistributedDataParallel], groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """Return AdamW over the model chunks; one-dimensional parameters have no weight decay.

    With `parallel.use_distributed_optimizer` the fp32 masters and moments are sharded over the
    data-parallel ranks.
    """
    optimizer = get_megatron_optimizer(
        make_optimizer_config(plan),
        [*model],
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    attach_schedule_callbacks(model, optimizer, groups)
    return optimizer


def attach_schedule_callbacks(
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer | None,
    groups: ProcessGroupCollection,
) -> None:
    """Write the callbacks that megatron's schedules call; the only place that writes its config.

    Args:
        model: wrapped model chunks of this rank.
        optimizer: supplies the loss scale; None for gradients without an optimizer.
        groups: process groups for the gradient reductions.
    """
    config = get_model_config(model[0])
    no_sync = [chunk.no_sync for chunk in model]
    config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
    config.grad_scale_func = optimizer.scale_loss if optimizer is not None else None
    config.finalize_model_grads_func = partial(_finalize, groups=groups)


@torch.no_grad()
def gather_parameters(model: list[DistributedDataParallel]) -> None:
    """Make all parameters current. Collective over the data-parallel ranks.

    With `parallel.overlap_param_gather` a step leaves each rank with the shard that it updated; the
    rest follows during the next forward. Call this before parameters are read in another way.
    """
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def _finalize(
    model: list[DistributedDataParallel],
    num_tokens: torch.Tensor | None = None,
    *_: Any,
    groups: ProcessGroupCollection,
    **kwargs: Any,
) -> None:
    """Reduce gradients as a plain sum: the loss was divided by global counts before backward."""
    kwargs.pop("pg_collection", None)
    finalize_model_grads([*model], None, pg_collection=groups, **kwargs)


def set_learning_rate(optimizer: MegatronOptimizer, lr: float, weight_decay: float) -> None:
    """Set learning rate and weight decay of every group, times the group's multipliers."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)
        group["weight_decay"] = weight_decay * group.get("wd_mult", 1.0)
