"""Building the model chunks of this rank."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from ring_train.config import TransformerImpl
from ring_train.model.experts import check_dispatcher
from ring_train.model.init import initialise
from ring_train.model.language_model import HybridLanguageModel
from ring_train.model.lora import freeze_base
from ring_train.ops.backends import resolve_backend
from ring_train.ops.lightning import lightning_backend
from ring_train.plan import Phase, Plan, PlanError
from ring_train.plan.megatron import DTYPES, make_ddp_config, make_transformer_config


def build_model(plan: Plan, groups: ProcessGroupCollection) -> list[DistributedDataParallel]:
    """Return the initialised model chunks of this rank, one per virtual stage, wrapped for DP.

    Parameters are created in the precision of the plan; buffers of the router stay fp32. With
    adapters everything else is frozen and has no gradient.

    Raises:
        PlanError: a library or a device that the run needs is not there.
    """
    check_dispatcher(plan.config.kernels)
    check_backends(plan)
    if plan.config.kernels.transformer_impl is TransformerImpl.transformer_engine:
        from ring_train.model.engine import check_engine

        check_engine(plan.config.kernels)
    config = make_transformer_config(plan)
    stages = range(plan.mesh.vpp) if plan.mesh.vpp > 1 else [None]
    chunks = [HybridLanguageModel(plan, config, groups, vp_stage) for vp_stage in stages]
    initialise(chunks, plan)
    if plan.lora is not None:
        freeze_base(chunks)
    if torch.cuda.is_available():
        chunks = [chunk.cuda() for chunk in chunks]
    return [
        DistributedDataParallel(
            config, make_ddp_config(plan), chunk, disable_bucketing=i > 0, pg_collection=groups
        )
        for i, chunk in enumerate(chunks)
    ]


def check_backends(plan: Plan) -> None:
    """Raise PlanError where a chosen backend does not compute tensors of this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sample = torch.empty(0, dtype=DTYPES[plan.config.train.precision], device=device)
    resolvers: dict[str, Callable[[str, torch.Tensor], str]] = {"fused": resolve_backend}
    if "lightning" in plan.layers.token_mixers:
        resolvers["lightning"] = lightning_backend
    for name, resolve in resolvers.items():
        backend = getattr(plan.config.kernels, name).value
        try:
            resolve(backend, sample)
        except ValueError as error:
            raise PlanError([f"kernels.{name}={backend}: {error}"]) from error


def enter_phase(model: list[DistributedDataParallel], phase: Phase) -> None:
    """Use the position embedding of a phase from the next forward on."""
    for chunk in model:
        unwrapped = chunk.module
        assert isinstance(unwrapped, HybridLanguageModel)
        unwrapped.enter_phase(phase)
