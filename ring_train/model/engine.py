"""Parts of a layer made of Transformer Engine's modules; imported only by runs that choose them.

Under FP8 megatron runs each layer in a context that modules of Transformer Engine read, and only
they. So what must keep its precision is no module of theirs: router, `linear_gate`, QK norms and
gate norm, like embedding, lm_head and the MTP projections outside the layers. Softmax attention is
theirs but computes in bf16: the recipe leaves attention out. Their norms compute in fp32.

A norm is part of the projection behind it where that is its only reader. Lightning attention reads
the normalised input twice (`linear_qkv`, and `linear_gate` in high precision), a mixture of experts
three times: their norms are modules of their own. `model.tensors` gives the same names to both.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_train.config import Fp8, KernelsConfig
from ring_train.model.documents import Documents
from ring_train.plan import PlanError

NORMALISING_MIXERS = ("gqa", "dense")
"""Mixers whose first projection is the only reader of their normalised input."""
FP8_CAPABILITY = 9, 0
"""The least compute capability that has the blockwise recipe."""


class EngineAttention(torch.nn.Module):
    """Core attention of Transformer Engine: causal softmax within each document.

    Not for context parallelism: theirs cuts every document into parts of one length for its ring,
    where rows here are cut wherever a segment ends.
    """

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__()
        self.scale = (config.kv_channels or 0) ** -0.5
        kwargs |= {"softmax_scale": self.scale, "attn_mask_type": AttnMaskType.causal}
        self.attention = TEDotProductAttention(config, **kwargs)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        """Return [t, n/tp, d] from query [t, n/tp, d] and key, value [t, g/tp, d]."""
        out = self.attention(
            query,
            key,
            value,
            attention_mask=None,
            attn_mask_type=AttnMaskType.causal,
            packed_seq_params=documents,
        )  # [t, n*d/tp]
        return out.view(query.shape)


def norm_before(mixer: str) -> Any:
    """Return the builder of the norm in front of a mixer; the identity where it norms itself."""
    return IdentityOp if mixer in NORMALISING_MIXERS else TENorm


def attention_submodules(mixer: str, *, qk_norm: Any, core: Any) -> SelfAttentionSubmodules:
    """Return the parts of a token mixer.

    Args:
        mixer: its name in the registry.
        qk_norm: builder of the norms of query and key, or None.
        core: builder of the core attention.
    """
    return SelfAttentionSubmodules(
        linear_qkv=_first_projection(mixer),
        core_attention=core,
        linear_proj=_builder(TERowParallelLinear),
        q_layernorm=qk_norm,
        k_layernorm=qk_norm,
    )


def mlp_submodules(mixer: str) -> MLPSubmodules:
    """Return the projections of a dense MLP, or of the shared experts of "moe"."""
    return MLPSubmodules(
        linear_fc1=_first_projection(mixer), linear_fc2=_builder(TERowParallelLinear)
    )


def expert_submodules() -> GroupedMLPSubmodules:
    """Return the grouped projections of the routed experts."""
    return GroupedMLPSubmodules(
        linear_fc1=_builder(TEColumnParallelGroupedLinear),
        linear_fc2=_builder(TERowParallelGroupedLinear),
    )


def _first_projection(mixer: str) -> Any:
    normalises = mixer in NORMALISING_MIXERS
    return _builder(TELayerNormColumnParallelLinear if normalises else TEColumnParallelLinear)


def _builder(module: Any) -> Any:
    """Return a module class as what megatron's types call a builder."""
    return module


def check_engine(kernels: KernelsConfig) -> None:
    """Raise PlanError where Transformer Engine cannot compute what a run asks of it."""
    chosen = "kernels.transformer_impl=transformer_engine"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError) as error:
        problem = (
            f"{chosen} needs Transformer Engine, which cannot be imported here ({error}); install "
            "it (docs/transformer-engine.md), or choose kernels=standard"
        )
        raise PlanError([problem]) from error
    if not torch.cuda.is_available():
        raise PlanError([f"{chosen} needs a GPU, and there is none here; choose kernels=standard"])
    capability = torch.cuda.get_device_capability()
    if kernels.fp8 is not Fp8.none and capability < FP8_CAPABILITY:
        problem = (
            f"kernels.fp8={kernels.fp8.value} needs compute capability 9.0 (H100) or higher, but "
            f"{torch.cuda.get_device_name()} has {'.'.join(map(str, capability))}; choose "
            "kernels=transformer_engine, which computes in bf16"
        )
        raise PlanError([problem])
