"""Lightning attention: linear attention with a constant decay per head (model-spec 2.2).

MHA projections (`linear_qkv`, `linear_proj`) and QK-norm come from megatron's `SelfAttention`; the
gate projection, the grouped gate norm and the recurrence are ours. Decay slopes are no checkpoint
tensor: they follow from the global layer index and `model.decay_layer_rule`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_train.config import KernelsConfig, ModelConfig
from ring_train.model.attention import split_heads
from ring_train.model.context import context_lightning_attention
from ring_train.model.decoding import StateCache
from ring_train.model.documents import Documents
from ring_train.model.norm import GatedGroupNorm
from ring_train.ops.decay import decay_slopes
from ring_train.ops.lightning import lightning_attention


class LightningAttention(SelfAttention):
    """Token mixer of the linear layers.

    Args:
        config: megatron's config of the model; a copy with one key and value per head is used.
        submodules: projections and norms; `core_attention` is not used.
        layer_number: 1-based, global.
        model: the model node, for decay rule, norm groups and activation.
        kernels: the kernels node.
        linear_gate: builder of the gate's projection, called like that of `linear_qkv`.
        pg_collection: process groups.
    """

    # megatron types these by the arguments that its own forward passes.
    linear_proj: Any
    linear_gate: Any

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        model: ModelConfig,
        kernels: KernelsConfig,
        linear_gate: Callable[..., torch.nn.Module],
        pg_collection: ProcessGroupCollection,
        **kwargs: Any,
    ) -> None:
        config = copy.copy(config)
        config.num_query_groups = config.num_attention_heads
        super().__init__(config, submodules, layer_number, pg_collection=pg_collection, **kwargs)
        tp_rank, tp = pg_collection.tp.rank(), pg_collection.tp.size()
        heads = model.num_attention_heads // tp
        self.silu = model.linear_silu
        self.backend, self.fused = kernels.lightning.value, kernels.fused.value
        self.cp_group = pg_collection.cp
        assert config.init_method is not None
        self.linear_gate = linear_gate(
            config.hidden_size,
            self.query_projection_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="gate",
            tp_group=pg_collection.tp,
        )
        self.gate_norm = GatedGroupNorm(
            config, heads * model.kv_channels, model.group_norm_size // tp, self.fused
        )
        slopes = decay_slopes(
            model.num_attention_heads,
            layer_number - 1,
            model.num_layers,
            model.decay_layer_rule.value,
            dtype=torch.promote_types(config.params_dtype, torch.float32),
        )
        self.register_buffer(
            "slopes", slopes[tp_rank * heads : (tp_rank + 1) * heads], persistent=False
        )  # [n/tp] fp32

    def forward(  # pyrefly: ignore[bad-override]  # inference arguments do not apply here
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: Documents | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (output [t/cp/sp, 1, h], None); arguments as in `GroupedQueryAttention`."""
        assert rotary_pos_emb is not None
        assert packed_seq_params is not None
        inputs = split_heads(
            self, hidden_states, rotary_pos_emb, silu=self.silu, backend=self.fused
        )  # query, key, value [t/cp, n/tp, d]
        core = partial(self._attend, documents=packed_seq_params)
        if self.checkpoint_core_attention and self.training:
            out: Any = checkpoint(core, False, *inputs)
        else:
            out = core(*inputs)  # [t/cp, n/tp, d]
        gate, _ = self.linear_gate(hidden_states)  # [t/cp, 1, n*d/tp]
        out = self.gate_norm(out.reshape(out.shape[0], -1), gate.squeeze(1))  # [t/cp, n*d/tp]
        return self.linear_proj(out.unsqueeze(1))

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        """Return [t/cp, n/tp, d] from query, key and value of that shape."""
        if documents.decoding is not None:
            cache: StateCache = documents.decoding.caches[self.layer_number]
            return cache.attend(query, key, value, self.slopes, documents=documents)
        if documents.context is not None:
            return context_lightning_attention(
                query,
                key,
                value,
                self.slopes,
                documents=documents,
                group=self.cp_group,
                backend=self.backend,
            )
        out, _ = lightning_attention(
            query,
            key,
            value,
            self.slopes,
            cu_seqlens=documents.cu_seqlens_q,
            lengths=documents.lengths,
            backend=self.backend,
        )
        return out

    def build_cache(self, num_slots: int) -> StateCache:
        """Return an empty cache for this layer."""
        return StateCache(num_slots)
