"""Softmax grouped-query attention over packed documents.

The projections, QK-norm and their tensor-parallel sharding are megatron's `SelfAttention`; the
forward is ours because rotary angles come by position (documents restart at 0) and because
megatron's local core attention refuses packed rows.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_train.model.documents import Documents
from ring_train.ops.attention import document_attention
from ring_train.ops.rope import apply_partial_rope


class DocumentAttention(torch.nn.Module):
    """Core attention: causal softmax within each document, on any device."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__()
        self.scale = (config.kv_channels or 0) ** -0.5

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        """Return [t, n/tp, d] from query [t, n/tp, d] and key, value [t, g/tp, d]."""
        return document_attention(
            query,
            key,
            value,
            cu_seqlens=documents.cu_seqlens_q,
            lengths=documents.lengths,
            scale=self.scale,
        )


class GroupedQueryAttention(SelfAttention):
    """GQA with QK-norm before partial RoPE (model-spec 2.1); documents never see each other."""

    # megatron types these by the arguments that its own forward passes.
    core_attention: Any
    linear_proj: Any

    def forward(  # pyrefly: ignore[bad-override]  # inference arguments do not apply here
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: Documents | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (output [t/sp, 1, h], None).

        Args:
            hidden_states: [t/sp, 1, h], normalised block input.
            attention_mask: unused; boundaries come with `packed_seq_params`.
            rotary_pos_emb: [2, t, rotary_dim] fp32: cos and sin of every token's angles.
            packed_seq_params: document boundaries of the row.
        """
        assert rotary_pos_emb is not None
        assert packed_seq_params is not None
        qkv: tuple[Any, ...] = self.get_query_key_value_tensors(hidden_states)
        query, key, value = qkv  # [t, 1, n/tp, d], [t, 1, g/tp, d] twice
        cos, sin = rotary_pos_emb
        query = apply_partial_rope(query.squeeze(1), cos, sin)  # [t, n/tp, d]
        key = apply_partial_rope(key.squeeze(1), cos, sin)  # [t, g/tp, d]
        out = self.core_attention(query, key, value.squeeze(1), packed_seq_params)
        return self.linear_proj(out.reshape(out.shape[0], 1, -1))
