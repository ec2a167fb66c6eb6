"""Config of the first generation, Ling-lite and Ring-lite; it travels inside an export."""

from typing import Any, ClassVar

from .configuration_bailing_moe_v2 import BailingMoeV2Config


class BailingMoeConfig(BailingMoeV2Config):
    """What `config.json` of a BailingMoeForCausalLM folder says, under the released names."""

    model_type = "bailing_moe"

    required_keys: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "first_k_dense_replace",
        "max_position_embeddings",
        "rms_norm_eps",
        "rope_theta",
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "num_shared_experts",
        "norm_head",
    )
    only_values: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_bias": False,
        "use_qkv_bias": False,
        "norm_topk_prob": True,
        "norm_softmax": False,
        "use_qk_norm": False,
        "score_function": "softmax",
        "routed_scaling_factor": 1.0,
        "partial_rotary_factor": 1.0,
        "moe_router_enable_expert_bias": False,
        "num_nextn_predict_layers": 0,
    }

    def __init__(self, **kwargs: Any) -> None:
        """Take every key of `config.json`; without `head_dim` the heads fill the hidden size."""
        if kwargs.get("head_dim") is None and {"hidden_size", "num_attention_heads"} <= set(kwargs):
            kwargs["head_dim"] = kwargs["hidden_size"] // kwargs["num_attention_heads"]
        super().__init__(**kwargs)
