"""The first generation, Ling-lite and Ring-lite, in plain torch, for transformers 4.56 to 5.x.

This file travels inside an exported folder. What differs from its sibling
`modeling_bailing_moe_v2.py`: the router (softmax, no bias, no groups), the attention (no QK-norm,
rope on all channels) and the head, whose channels may be normalised over the vocabulary.

Shape letters as there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_bailing_moe import BailingMoeConfig
from .modeling_bailing_moe_v2 import (
    BailingMoeV2Attention,
    BailingMoeV2ForCausalLM,
    BailingMoeV2MLP,
    BailingMoeV2Model,
    BailingMoeV2SparseMoeBlock,
    at_least_fp32,
)

HEAD_NORM_EPS = 1e-7


class BailingMoeGate(nn.Linear):
    """Softmax router: the largest probabilities, divided by their sum."""

    def __init__(self, config: BailingMoeConfig) -> None:
        """Make the weight [e, h]."""
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.top_k = config.num_experts_per_tok

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of each token [t, k] and their weights [t, k] fp32."""
        scores = F.linear(at_least_fp32(x), at_least_fp32(self.weight)).softmax(-1)  # [t, e] fp32
        weights, experts = scores.topk(self.top_k, dim=-1)
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        return experts, weights


class BailingMoeAttention(BailingMoeV2Attention):
    """Causal softmax attention with grouped queries, without QK-norm."""

    def __init__(self, config: BailingMoeConfig, layer_index: int) -> None:
        """Make one layer's projections; `layer_index` is its place in the cache."""
        super().__init__(config, layer_index)
        self.query_layernorm = nn.Identity()
        self.key_layernorm = nn.Identity()


class BailingMoeModel(BailingMoeV2Model):
    """Embedding, layers and final norm."""

    config_class = BailingMoeConfig

    def make_attention(self, layer_index: int) -> nn.Module:
        """Return the token mixer of one layer."""
        return BailingMoeAttention(self.config, layer_index)

    def make_mlp(self, layer_index: int) -> nn.Module:
        """Return the channel mixer of one layer; the shared experts are one wide MLP."""
        config = self.config
        if layer_index < config.first_k_dense_replace:
            return BailingMoeV2MLP(config.hidden_size, config.intermediate_size)
        shared_size = config.num_shared_experts * config.moe_intermediate_size
        return BailingMoeV2SparseMoeBlock(config, BailingMoeGate(config), shared_size)

    @property
    def rotary_size(self) -> int:
        """Channels of a head that rotate: all."""
        return self.config.head_dim


class BailingMoeForCausalLM(BailingMoeV2ForCausalLM):
    """Ling-lite or Ring-lite with its language-model head."""

    config_class = BailingMoeConfig
    trunk_class = BailingMoeModel

    def project(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits [b, s, v]; no gradient flows through the norms of the head.

        A weight whose columns are divided gives what divided hidden states do.
        """
        if self.config.norm_head:
            weight = self.lm_head.weight.detach()
            dtype = at_least_fp32(weight[:0]).dtype
            norms = torch.linalg.vector_norm(weight, dim=0, dtype=dtype)  # [h]
            hidden = (hidden / (norms + HEAD_NORM_EPS)).to(hidden.dtype)
        return super().project(hidden)
