"""Config of the softmax Ling 2.0 family for transformers; it travels inside an export.

Unusual: keys have no defaults, because a guessed routing scale or rope base gives a model that
loads and is wrong; and what the modeling file does not implement is refused.
"""

from typing import Any, ClassVar

from transformers import PretrainedConfig


class BailingMoeV2Config(PretrainedConfig):
    """What `config.json` of a BailingMoeV2ForCausalLM folder says, under the released names."""

    model_type = "bailing_moe"
    has_no_defaults_at_init = True
    keys_to_ignore_at_inference = ("past_key_values",)

    required_keys: ClassVar[tuple[str, ...]] = (
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
    )
    only_values: ClassVar[dict[str, Any]] = {
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    }

    def __init__(self, **kwargs: Any) -> None:
        """Take every key of `config.json`.

        Raises:
            ValueError: a key is missing, or asks for what the modeling file does not implement.
        """
        missing = [key for key in self.required_keys if kwargs.get(key) is None]
        if missing:
            raise ValueError(
                f"config.json lacks {missing}; add them with the values of the training run"
            )
        for key, only in self.only_values.items():
            if kwargs.get(key, only) != only:
                raise ValueError(
                    f"config.json: {key}={kwargs[key]!r}; this modeling file implements "
                    f"{key}={only!r} only"
                )
        yarn = _yarn(kwargs.pop("rope_scaling", None), kwargs.pop("rope_parameters", None))
        kwargs["tie_word_embeddings"] = False
        self.num_nextn_predict_layers = kwargs.pop("num_nextn_predict_layers", 0)
        self.initializer_range = kwargs.pop("initializer_range", 0.02)
        self.use_cache = kwargs.pop("use_cache", True)
        super().__init__(**kwargs)
        self.yarn = yarn
        if hasattr(type(self), "rope_scaling"):  # transformers 5, where engines read another name
            kind = yarn or {"rope_type": "default"}
            self.rope_parameters = {**kind, "rope_theta": self.rope_theta}
        elif yarn is not None:
            self.rope_scaling = {**yarn, "rope_theta": self.rope_theta}

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of `config.json`, position embedding under the name that engines read."""
        keys = super().to_dict()
        keys.pop("rope_parameters", None)
        keys["rope_scaling"] = keys.pop("yarn", None)
        return keys


def _yarn(
    scaling: dict[str, Any] | None, parameters: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Return what is said of YaRN under either name; refuse what the modeling file cannot do."""
    given = scaling or parameters
    if given is None or given.get("rope_type", given.get("type")) in (None, "default"):
        return None
    keys = ("rope_type", "factor", "original_max_position_embeddings")
    if given.get("rope_type") == "yarn" and not set(given) - {
        *keys,
        "rope_theta",
        "partial_rotary_factor",
    }:
        return {key: given[key] for key in keys}
    raise ValueError(
        f"config.json: rope_scaling={given!r}; this modeling file implements null and "
        f"rope_type=yarn with {keys[1:]} only"
    )
