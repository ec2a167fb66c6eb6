"""Multi-token prediction: one extra transformer layer per depth (model-spec 2.4).

The rolled tokens arrive with the batch, so no layout needs a roll across ranks and no roll can
cross a document boundary. Embedding and output head are the model's own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_train.model.documents import Documents
from ring_train.model.norm import RMSNorm


class MtpLayer(torch.nn.Module):
    """One depth: eh_proj(concat[enorm(embedding), hnorm(hidden)]), a layer, a final norm."""

    def __init__(
        self,
        config: TransformerConfig,
        layer: ModuleSpec,
        depth: int,
        groups: ProcessGroupCollection,
        backend: str,
    ) -> None:
        super().__init__()
        self.config, self.groups = config, groups
        self.sequence_parallel = config.sequence_parallel
        self.recompute = config.recompute_granularity == "full"
        hidden, eps = config.hidden_size, config.layernorm_epsilon
        assert config.init_method is not None
        self.enorm = RMSNorm(config, hidden, eps, backend)
        self.hnorm = RMSNorm(config, hidden, eps, backend)
        self.eh_proj = tensor_parallel.ColumnParallelLinear(
            2 * hidden,
            hidden,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            tp_group=groups.tp,
        )
        self.transformer_layer: Any = build_module(
            layer, config=config, layer_number=depth, pg_collection=groups, is_mtp_layer=True
        )
        self.final_layernorm = RMSNorm(config, hidden, eps, backend)

    @property
    def mtp_model_layer(self) -> torch.nn.Module:
        """The transformer layer, under the name that megatron's schedules look for."""
        return self.transformer_layer

    def forward(
        self,
        hidden_states: torch.Tensor,
        embedding: torch.Tensor,
        rotary_pos_emb: torch.Tensor,
        documents: Documents,
        padding_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the hidden states of this depth [t/sp, 1, h], after its final norm.

        Args:
            hidden_states: [t/sp, 1, h], after the final norm of the trunk or previous depth.
            embedding: [t/sp, 1, h], embedding of the token that this depth sees at each position.
            rotary_pos_emb: [2, t, rotary_dim] fp32.
            documents: boundaries of the row.
            padding_mask: [1, t/sp] bool, True where padding.
        """
        layer = partial(self._forward, documents=documents)
        inputs = (hidden_states, embedding, rotary_pos_emb, padding_mask)
        if self.recompute and self.training:
            return tensor_parallel.checkpoint(layer, False, *inputs)
        return layer(*inputs)

    def _forward(
        self,
        hidden_states: torch.Tensor,
        embedding: torch.Tensor,
        rotary_pos_emb: torch.Tensor,
        padding_mask: torch.Tensor | None,
        *,
        documents: Documents,
    ) -> torch.Tensor:
        joined = torch.cat([self.enorm(embedding), self.hnorm(hidden_states)], dim=-1)
        projected, _ = self.eh_proj(joined)  # [t, 1, h/tp]
        projected = tensor_parallel.gather_from_tensor_model_parallel_region(
            projected, group=self.groups.tp
        )
        if self.sequence_parallel:
            projected = tensor_parallel.scatter_to_sequence_parallel_region(
                projected, group=self.groups.tp
            )
        with get_fp8_context(self.config):  # norms and eh_proj keep their precision
            hidden, _ = self.transformer_layer(
                hidden_states=projected,
                attention_mask=None,
                rotary_pos_emb=rotary_pos_emb,
                packed_seq_params=documents,
                padding_mask=padding_mask,
            )
        return self.final_layernorm(hidden)


class MtpBlock(torch.nn.Module):
    """The MTP layers of the last pipeline stage, depth 1 first."""

    def __init__(
        self,
        config: TransformerConfig,
        layers: list[ModuleSpec],
        groups: ProcessGroupCollection,
        backend: str,
    ) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            MtpLayer(config, layer, depth, groups, backend)
            for depth, layer in enumerate(layers, start=1)
        )
