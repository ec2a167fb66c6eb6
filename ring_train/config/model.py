"""What the model is. Where megatron-core has a name for a value, the field has the same name."""

from dataclasses import dataclass, field
from typing import Any

from ring_train.config.choices import Architecture, DecayLayerRule, ScoreFunction


@dataclass(kw_only=True)
class ModelConfig:
    """Geometry and recipe constants of one model; the unit of a preset in `conf/model/`."""

    architecture: Architecture
    """Hugging Face family written by export."""

    num_layers: int
    """Decoder layers, MTP layers excluded."""
    hidden_size: int
    ffn_hidden_size: int
    """Inner width of the dense MLP."""
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads of softmax layers; lightning layers have one per query head."""
    kv_channels: int
    """Channels of one attention head."""
    vocab_size: int
    """Rows of the embedding, padding included."""
    max_position_embeddings: int
    """Tokens; the longest sequence that export promises."""

    layer_group_size: int
    """Every so many layers one is softmax attention, the others lightning; 1 = all softmax."""
    first_k_dense_replace: int
    """Leading layers whose MLP is dense; the others are MoE."""
    token_mixers: list[str] | None = None
    """One registered token mixer per layer; null = follows layer_group_size."""
    channel_mixers: list[str] | None = None
    """One registered channel mixer per layer; null = follows first_k_dense_replace."""

    layernorm_epsilon: float
    init_method_std: float
    """Standard deviation of initial weights, router included."""
    qk_layernorm: bool
    """RMSNorm on each query and key head, in both layer types."""
    rotary_percent: float
    """Fraction of a head's channels, from the first, that rotate."""
    rotary_base: float
    rotary_scaling_factor: float = 1.0
    """YaRN: how many times original_max_position_embeddings is stretched; 1 = not at all."""
    original_max_position_embeddings: int | None = None
    """Context that YaRN stretches, tokens; null = max_position_embeddings."""

    group_norm_size: int
    """Number of groups of the RMSNorm on the output of lightning attention."""
    decay_layer_rule: DecayLayerRule
    linear_silu: bool
    """SiLU on queries, keys and values of lightning layers."""

    num_moe_experts: int | None
    """Routed experts; null = no MoE layer."""
    moe_router_topk: int
    """Experts per token."""
    moe_ffn_hidden_size: int
    """Inner width of one routed expert."""
    num_shared_experts: int
    moe_shared_expert_intermediate_size: int | None
    """Inner width of all shared experts together; null without shared experts."""
    moe_router_num_groups: int | None
    moe_router_group_topk: int | None
    """Expert groups that a token may choose from."""
    moe_router_score_function: ScoreFunction
    moe_router_topk_scaling_factor: float
    """Factor on the normalised weights of routed experts."""
    moe_router_enable_expert_bias: bool
    """Select experts by score + bias; the bias balances load without an auxiliary loss."""
    moe_router_bias_update_rate: float
    moe_router_bias_zero_mean: bool
    """Subtract the mean of the update over experts."""
    moe_z_loss_coeff: float
    moe_aux_loss_coeff: float

    mtp_num_layers: int
    """Multi-token-prediction depths."""
    mtp_loss_scaling_factor: float
    """Weight of all MTP losses together."""
    norm_head: bool
    """Divide each channel of lm_head by its norm over the vocabulary."""

    eos_token_id: int
    pad_token_id: int
    bos_token_id: int | None

    megatron: dict[str, Any] = field(default_factory=dict)
    """Passed through to TransformerConfig; names that have another owner are errors."""
