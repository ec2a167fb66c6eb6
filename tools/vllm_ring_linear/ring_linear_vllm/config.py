"""`config.json` of a Ring-linear 2.0 folder: its class, its checks, and the decay that it asks for.

Unusual: nothing is checked when the config is read, because `--hf-overrides` may still complete it;
`config_problems` is called when vLLM has the whole config.
"""

import math
from typing import Any

from transformers import PretrainedConfig

DECAY_LAYER_RULES = ("zero_based", "shifted")

REQUIRED_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "first_k_dense_replace",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "partial_rotary_factor",
    "num_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "num_shared_experts",
    "layer_group_size",
    "group_norm_size",
    "linear_silu",
)
"""Keys that vLLM would replace by a default of its own, or fail without."""

ONLY_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "use_rmsnorm": True,
    "norm_topk_prob": True,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
}
"""Keys that must be there with these values: absent ones mean something else to vLLM."""


class BailingMoeLinearV2Config(PretrainedConfig):
    """Every key of `config.json` under its own name."""

    model_type = "bailing_moe_linear"
    has_no_defaults_at_init = True

    def __init__(self, **kwargs: Any) -> None:
        """Take every key; position embedding goes to where engines look for it."""
        rope = kwargs.pop("rope_scaling", None) or kwargs.pop("rope_parameters", None) or {}
        super().__init__(**kwargs)
        kind = {"rope_type": rope.get("type", "default"), "rope_theta": kwargs.get("rope_theta")}
        self.rope_parameters = {**kind, **rope}


def config_problems(config: PretrainedConfig) -> list[str]:
    """Return what keeps a config from being served, one line each."""
    keys = vars(config)
    missing = [key for key in REQUIRED_KEYS if keys.get(key) is None]
    problems = [f"config.json lacks {', '.join(missing)}; export the folder again"] * bool(missing)
    problems += [
        f"config.json: {key}={keys.get(key)!r}, but only {key}={only!r} is implemented; "
        "export the folder again"
        for key, only in ONLY_VALUES.items()
        if keys.get(key) != only
    ]
    if not keys.get("linear_rope", True):
        problems.append("config.json: linear_rope=false is not implemented; serve another model")
    rule = keys.get("decay_layer_rule")
    if rule not in DECAY_LAYER_RULES:
        problems.append(
            f"config.json: decay_layer_rule={rule!r}, but it must be 'zero_based' (layer l of L "
            "forgets with 1 - l/(L-1)) or 'shifted' (1 - (l-1)/(L-1)), as the checkpoint was "
            "trained; no tensor tells which: add it to config.json, or give --hf-overrides "
            '\'{"decay_layer_rule": "zero_based"}\''
        )
    if not missing:
        problems += _shape_problems(config)
    return problems


def _shape_problems(config: Any) -> list[str]:
    problems = []
    layers, group = config.num_hidden_layers, config.layer_group_size
    if group < 1 or layers % group:
        problems.append(
            f"config.json: layer_group_size={group} does not divide num_hidden_layers={layers}; "
            "engines disagree about the layers that remain: export the folder again"
        )
    heads, norms = config.num_attention_heads, config.group_norm_size
    if norms < 1 or heads % norms:
        problems.append(
            f"config.json: group_norm_size={norms} does not divide num_attention_heads={heads}; "
            "export the folder again"
        )
    return problems


def is_lightning_layer(config: Any, layer_index: int) -> bool:
    """Return whether a layer (0-based) is linear attention: all but the last of each group."""
    return (layer_index + 1) % config.layer_group_size != 0


def decay_slopes(config: Any, layer_index: int) -> list[float]:
    """Return the positive log-decay per token of each head of one layer (0-based)."""
    place = layer_index if config.decay_layer_rule == "zero_based" else layer_index - 1
    last = config.num_hidden_layers - 1
    factor = 1 - (place / last if last else 0) + 1e-5
    return [slope * factor for slope in _head_slopes(config.num_attention_heads)]


def _head_slopes(num_heads: int) -> list[float]:
    """Return the ALiBi slopes 2^(-8(i+1)/n), i = 0..n-1; interleaved where n is no power of two."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    if power < num_heads:
        slopes += _head_slopes(2 * power)[0::2][: num_heads - power]
    return slopes
