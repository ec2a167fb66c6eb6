"""Layer specs: the one place where the modules of a layer are chosen.

`make_layer_spec` pairs the token mixer and the channel mixer that the plan names for a layer. The
registry in `ring_train.plan.mixers` points at the builder of each mixer by dotted path, so a new
mixer needs an entry there and no edit here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from ring_train.config import TransformerImpl
from ring_train.model.attention import DocumentAttention, GroupedQueryAttention
from ring_train.model.experts import GroupedExperts, MixtureOfExperts
from ring_train.model.lightning import LightningAttention
from ring_train.model.lora import column_parallel, row_parallel
from ring_train.model.norm import HeadNorm, RMSNorm
from ring_train.model.router import ExpertRouter
from ring_train.plan import Plan
from ring_train.plan.kernels import groups_experts
from ring_train.plan.mixers import CHANNEL_MIXERS, MTP_MIXERS, TOKEN_MIXERS

SpecBuilder = Callable[[Plan, TransformerConfig], ModuleSpec]


def make_layer_spec(plan: Plan, config: TransformerConfig, layer_index: int) -> ModuleSpec:
    """Return the spec of one layer; indices from num_layers on are MTP depths.

    Args:
        plan: the plan that names the mixers.
        config: megatron's config built from the plan.
        layer_index: 0-based, global.
    """
    if layer_index < plan.config.model.num_layers:
        token = plan.layers.token_mixers[layer_index]
        channel = plan.layers.channel_mixers[layer_index]
    else:
        token, channel = MTP_MIXERS
    bias_dropout_add: Any = get_bias_dropout_add  # a function where megatron's types say module
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=_norm_before(token, plan),
            self_attention=_builder(TOKEN_MIXERS[token].spec)(plan, config),
            self_attn_bda=bias_dropout_add,
            pre_mlp_layernorm=_norm_before(channel, plan),
            mlp=_builder(CHANNEL_MIXERS[channel].spec)(plan, config),
            mlp_bda=bias_dropout_add,
        ),
    )


def _builder(path: str) -> SpecBuilder:
    """Return the function behind "module:function"."""
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)


def _engine(plan: Plan) -> Any:
    """Return the module that makes parts of Transformer Engine's, or None without it."""
    if plan.config.kernels.transformer_impl is TransformerImpl.local:
        return None
    return importlib.import_module("ring_train.model.engine")


def _norm_before(mixer: str, plan: Plan) -> Any:
    """Return the builder of the norm in front of a mixer."""
    engine = _engine(plan)
    if engine is not None:
        return engine.norm_before(mixer)
    return partial(RMSNorm, backend=plan.config.kernels.fused.value)


def _attention_submodules(plan: Plan, mixer: str) -> SelfAttentionSubmodules:
    norm: Any = HeadNorm if plan.config.model.qk_layernorm else None
    core: Any = DocumentAttention  # its forward takes Documents, not megatron's arguments
    engine = _engine(plan)
    if engine is not None:
        if mixer == "gqa" and plan.mesh.cp == 1:
            core = engine.EngineAttention
        return engine.attention_submodules(mixer, qk_norm=norm, core=core)
    return SelfAttentionSubmodules(
        linear_qkv=column_parallel(plan, "linear_qkv"),
        core_attention=core,
        linear_proj=row_parallel(plan, "linear_proj"),
        q_layernorm=norm,
        k_layernorm=norm,
    )


def gqa_spec(plan: Plan, config: TransformerConfig) -> ModuleSpec:
    """Return the spec of softmax grouped-query attention."""
    return ModuleSpec(
        module=GroupedQueryAttention,
        params={"attn_mask_type": AttnMaskType.causal, "kernels": plan.config.kernels},
        submodules=_attention_submodules(plan, "gqa"),
    )


def lightning_spec(plan: Plan, config: TransformerConfig) -> ModuleSpec:
    """Return the spec of lightning attention."""
    return ModuleSpec(
        module=LightningAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "model": plan.config.model,
            "kernels": plan.config.kernels,
            "linear_gate": column_parallel(plan, "linear_gate"),
        },
        submodules=_attention_submodules(plan, "lightning"),
    )


def dense_spec(plan: Plan, config: TransformerConfig) -> partial[MLP]:
    """Return the builder of the dense SwiGLU MLP."""
    return partial(MLP.as_mlp_submodule, submodules=_mlp_submodules(plan, "mlp"))


def moe_spec(plan: Plan, config: TransformerConfig) -> partial[MixtureOfExperts]:
    """Return the builder of the mixture of experts: router, experts, shared expert."""
    shared = plan.config.model.moe_shared_expert_intermediate_size
    return partial(
        MixtureOfExperts,
        submodules=MoESubmodules(
            router=partial(
                ExpertRouter, model=plan.config.model, backend=plan.config.kernels.fused.value
            ),
            experts=_experts(plan),
            shared_experts=(
                partial(SharedExpertMLP, submodules=_mlp_submodules(plan, "shared_experts"))
                if shared
                else None
            ),
        ),
    )


def _experts(plan: Plan) -> Any:
    """Return the builder of the routed experts."""
    engine = _engine(plan)
    if engine is not None:
        return partial(TEGroupedMLP, submodules=engine.expert_submodules())
    if groups_experts(plan.config):
        return partial(GroupedExperts, backend=plan.config.kernels.fused.value)
    return partial(SequentialMLP, submodules=_mlp_submodules(plan, "experts"))


def _mlp_submodules(plan: Plan, part: str) -> MLPSubmodules:
    engine = _engine(plan)
    if engine is not None:
        return engine.mlp_submodules("dense" if part == "mlp" else "moe")
    return MLPSubmodules(
        linear_fc1=column_parallel(plan, f"{part}.linear_fc1"),
        linear_fc2=row_parallel(plan, f"{part}.linear_fc2"),
    )
