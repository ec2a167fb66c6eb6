"""Softmax grouped-query attention over packed documents.

The projections, QK-norm and their tensor-parallel sharding are megatron's `SelfAttention`; the
forward is ours because rotary angles come by position (documents restart at 0) and because
megatron's local core attention refuses packed rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_train.config import KernelsConfig
from ring_train.model.context import context_softmax_attention
from ring_train.model.decoding import KeyValueCache
from ring_train.model.documents import Documents
from ring_train.ops.attention import document_attention
from ring_train.ops.qk_norm_rope import split_qk_norm_rope


def split_heads(
    attention: SelfAttention,
    hidden_states: torch.Tensor,
    rotary_pos_emb: torch.Tensor,
    *,
    silu: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return query [t/cp, n/tp, d], key and value [t/cp, g/tp, d] of an attention, ready to attend.

    Args:
        attention: its `linear_qkv`, and its `HeadNorm`s if it has them.
        hidden_states: [t/cp/sp, 1, h], normalised block input.
        rotary_pos_emb: [2, t/cp, rotary_dim] fp32.
        silu: as in `split_qk_norm_rope`.
        backend: as in `split_qk_norm_rope`.
    """
    mixer: Any = attention  # megatron types its modules by the arguments of its own forward
    qkv, _ = mixer.linear_qkv(hidden_states)  # [t/cp, 1, (n + 2*g)*d/tp]
    groups, d = mixer.num_query_groups_per_partition, mixer.hidden_size_per_attention_head
    norms = mixer.q_layernorm, mixer.k_layernorm
    cos, sin = rotary_pos_emb
    return split_qk_norm_rope(
        qkv.view(qkv.shape[0], groups, -1, d),
        None if None in norms else (norms[0](), norms[1]()),
        cos,
        sin,
        eps=mixer.config.layernorm_epsilon,
        silu=silu,
        backend=backend,
    )


class DocumentAttention(torch.nn.Module):
    """Core attention: causal softmax within each document, on any device."""

    def __init__(
        self, config: TransformerConfig, *, pg_collection: ProcessGroupCollection, **_: Any
    ) -> None:
        super().__init__()
        self.scale = (config.kv_channels or 0) ** -0.5
        self.cp_group = pg_collection.cp

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        """Return [t/cp, n/tp, d] from query [t/cp, n/tp, d] and key, value [t/cp, g/tp, d]."""
        if documents.context is not None:
            return context_softmax_attention(
                query,
                key,
                value,
                row=documents.context,
                group=self.cp_group,
                scale=self.scale,
            )
        return document_attention(
            query,
            key,
            value,
            cu_seqlens=documents.cu_seqlens_q,
            lengths=documents.lengths,
            scale=self.scale,
        )


class GroupedQueryAttention(SelfAttention):
    """GQA with QK-norm before partial RoPE (model-spec 2.1); documents never see each other.

    Args:
        config: megatron's config of the model.
        submodules: projections, norms and core attention.
        layer_number: 1-based, global.
        kernels: the kernels node.
    """

    # megatron types these by the arguments that its own forward passes.
    core_attention: Any
    linear_proj: Any

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        kernels: KernelsConfig,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, layer_number, **kwargs)
        self.fused = kernels.fused.value

    def forward(  # pyrefly: ignore[bad-override]  # inference arguments do not apply here
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: Documents | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (output [t/cp/sp, 1, h], None).

        Args:
            hidden_states: [t/cp/sp, 1, h], normalised block input.
            attention_mask: unused; boundaries come with `packed_seq_params`.
            rotary_pos_emb: [2, t/cp, rotary_dim] fp32: cos and sin of every token's angles.
            packed_seq_params: document boundaries of the row.
        """
        assert rotary_pos_emb is not None
        assert packed_seq_params is not None
        inputs = split_heads(self, hidden_states, rotary_pos_emb, silu=False, backend=self.fused)
        core = partial(self.core_attention, documents=packed_seq_params)
        if packed_seq_params.decoding is not None:
            cache: KeyValueCache = packed_seq_params.decoding.caches[self.layer_number]
            scale = self.core_attention.scale
            core = partial(cache.attend, documents=packed_seq_params, scale=scale)
        if self.checkpoint_core_attention and self.training:
            out = checkpoint(core, False, *inputs)
        else:
            out = core(*inputs)
        return self.linear_proj(out.reshape(out.shape[0], 1, -1))

    def build_cache(self, num_slots: int) -> KeyValueCache:
        """Return an empty cache for this layer."""
        return KeyValueCache(num_slots)
