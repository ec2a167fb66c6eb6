"""The folder formats as one table: what each family is called and what its `config.json` says.

Every field of ModelConfig has one place in the row of a family: said by keys, fixed by the family,
or unsaid. So has every key that is read or written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_train.config import Architecture, DecayLayerRule, ModelConfig, ScoreFunction
from ring_train.hf import keys
from ring_train.hf.errors import HfError
from ring_train.hf.keys import Keys, absent_means, same
from ring_train.plan.layers import channel_mixers, token_mixers

MODELING_DIR = Path(__file__).parent / "modeling"
"""Holds the Python files that travel inside an export."""


DERIVED_FIELDS = frozenset({"token_mixers", "channel_mixers", "megatron"})
"""Fields that no folder says and that keep their defaults: patterns follow from other fields."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One folder format."""

    architecture: str
    """`architectures[0]`, the class of the model."""
    model_type: str
    config_class: str
    module: str
    """Ending of `configuration_*.py` and `modeling_*.py`."""
    modules: tuple[str, ...]
    """Endings of all files that an export needs."""
    keys: tuple[Keys, ...]
    """Keys that say fields of the model."""
    always: dict[str, Any]
    """Keys with one value, written; another is refused, absence means this one."""
    never_else: dict[str, Any]
    """Keys with one value that the format leaves out; another is refused."""
    carried: dict[str, Any]
    """Keys that are written because released folders have them; nothing reads them."""
    fixed: dict[str, Any]
    """Fields that every model of the family has alike."""
    unsaid: dict[str, Any]
    """Fields that no key says, and what they are when a folder is read: the training recipe, and
    what nothing in the family depends on."""

    @property
    def auto_map(self) -> dict[str, str]:
        """What transformers loads from the folder."""
        return {
            "AutoConfig": f"configuration_{self.module}.{self.config_class}",
            "AutoModelForCausalLM": f"modeling_{self.module}.{self.architecture}",
        }

    @property
    def modeling_files(self) -> tuple[Path, ...]:
        """The Python files that travel inside an export."""
        kinds = ("configuration", "modeling")
        return tuple(
            MODELING_DIR / f"{kind}_{module}.py" for kind in kinds for module in self.modules
        )


COMMON_KEYS = (
    same("num_hidden_layers", "num_layers"),
    same("hidden_size", "hidden_size"),
    same("intermediate_size", "ffn_hidden_size"),
    same("num_attention_heads", "num_attention_heads"),
    same("num_key_value_heads", "num_query_groups"),
    same("vocab_size", "vocab_size"),
    same("first_k_dense_replace", "first_k_dense_replace"),
    same("rms_norm_eps", "layernorm_epsilon", float),
    same("num_experts", "num_moe_experts"),
    same("num_experts_per_tok", "moe_router_topk"),
    same("moe_intermediate_size", "moe_ffn_hidden_size"),
    same("eos_token_id", "eos_token_id"),
    same("pad_token_id", "pad_token_id"),
    absent_means("initializer_range", "init_method_std", 0.006, float),
    keys.BEGINNING,
    keys.CONTEXT,
    keys.ROPE_BASE,
    keys.YARN,
)
V1_KEYS = (
    *COMMON_KEYS,
    keys.HEAD_WIDTH_BY_DEFAULT,
    keys.SHARED_EXPERTS_LIKE_ROUTED,
    absent_means("norm_head", "norm_head", False, bool),
)
V2_KEYS = (
    *COMMON_KEYS,
    same("head_dim", "kv_channels"),
    same("partial_rotary_factor", "rotary_percent", float),
    same("routed_scaling_factor", "moe_router_topk_scaling_factor", float),
    absent_means("num_nextn_predict_layers", "mtp_num_layers", 0),
    absent_means("mtp_loss_scaling_factor", "mtp_loss_scaling_factor", 0.1, float),
    keys.ROUTER_GROUPS,
    keys.SHARED_EXPERTS_WITH_WIDTH,
)
LINEAR_KEYS = (
    *V2_KEYS,
    same("layer_group_size", "layer_group_size"),
    same("group_norm_size", "group_norm_size"),
    absent_means("linear_silu", "linear_silu", False, bool),
    keys.DECAY_RULE,
)

COMMON_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "norm_topk_prob": True,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "attention_dropout": 0.0,
}
V2_VALUES: dict[str, Any] = {
    **COMMON_VALUES,
    "use_rmsnorm": True,
    "use_qk_norm": True,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}
V2_FIXED: dict[str, Any] = {
    "qk_layernorm": True,
    "norm_head": False,
    "moe_router_score_function": ScoreFunction.sigmoid,
    "moe_router_enable_expert_bias": True,
}
V2_RECIPE: dict[str, Any] = {
    "moe_router_bias_update_rate": 1e-3,
    "moe_router_bias_zero_mean": True,
    "moe_z_loss_coeff": 3.5e-6,
    "moe_aux_loss_coeff": 0.0,
}
"""model-spec 2.3."""
V1_RECIPE: dict[str, Any] = {
    "moe_router_bias_update_rate": 0.0,
    "moe_router_bias_zero_mean": False,
    "moe_z_loss_coeff": 1e-7,
    "moe_aux_loss_coeff": 1e-5,
    "mtp_loss_scaling_factor": 0.0,
}
"""Of Ring-lite's RL (arXiv 2506.14731, 4.3.2)."""
NOT_LINEAR: dict[str, Any] = {
    "group_norm_size": 1,
    "decay_layer_rule": DecayLayerRule.zero_based,
    "linear_silu": False,
}
"""Fields that nothing depends on without linear layers."""

FAMILIES = {
    Architecture.bailing_moe: Family(
        architecture="BailingMoeForCausalLM",
        model_type="bailing_moe",
        config_class="BailingMoeConfig",
        module="bailing_moe",
        modules=("bailing_moe_v2", "bailing_moe"),
        keys=V1_KEYS,
        always={**COMMON_VALUES, "norm_softmax": False},
        never_else={
            "partial_rotary_factor": 1.0,
            "use_qk_norm": False,
            "score_function": "softmax",
            "routed_scaling_factor": 1.0,
            "moe_router_enable_expert_bias": False,
            "num_nextn_predict_layers": 0,
        },
        carried={"pretraining_tp": 1, "use_cache": True},
        fixed={
            "layer_group_size": 1,
            "qk_layernorm": False,
            "rotary_percent": 1.0,
            "moe_router_num_groups": None,
            "moe_router_group_topk": None,
            "moe_router_score_function": ScoreFunction.softmax,
            "moe_router_topk_scaling_factor": 1.0,
            "moe_router_enable_expert_bias": False,
            "mtp_num_layers": 0,
        },
        unsaid={**V1_RECIPE, **NOT_LINEAR},
    ),
    Architecture.bailing_moe_v2: Family(
        architecture="BailingMoeV2ForCausalLM",
        model_type="bailing_moe",
        config_class="BailingMoeV2Config",
        module="bailing_moe_v2",
        modules=("bailing_moe_v2",),
        keys=V2_KEYS,
        always=V2_VALUES,
        never_else={},
        carried={"max_window_layers": 20, "use_cache": True},
        fixed={**V2_FIXED, "layer_group_size": 1},
        unsaid={**V2_RECIPE, **NOT_LINEAR},
    ),
    Architecture.bailing_moe_linear_v2: Family(
        architecture="BailingMoeLinearV2ForCausalLM",
        model_type="bailing_moe_linear",
        config_class="BailingMoeLinearV2Config",
        module="bailing_moe_linear_v2",
        modules=("bailing_moe_v2", "bailing_moe_linear_v2"),
        keys=LINEAR_KEYS,
        always=V2_VALUES,
        never_else={"linear_rope": True},
        carried={"max_window_layers": 20, "use_cache": True},
        fixed=V2_FIXED,
        unsaid=V2_RECIPE,
    ),
}


def family_of(path: Path, raw: dict[str, Any]) -> Architecture:
    """Return the family that a parsed `config.json` names in `architectures[0]`."""
    names = raw.get("architectures")
    known = {family.architecture: key for key, family in FAMILIES.items()}
    if not isinstance(names, list) or not names or names[0] not in known:
        raise HfError(
            f"{path}: architectures={names!r}; its first must be one of {', '.join(known)}"
        )
    return known[names[0]]


def family_problems(model: ModelConfig) -> list[str]:
    """Return what keeps a model from being written in the format of its family, one line each."""
    family = FAMILIES[model.architecture]
    problems = [
        f"model.{name}={found}, but every model of {model.architecture} has {value}"
        for name, value in family.fixed.items()
        if (found := getattr(model, name)) != value and not _is_one_group(name, found, value)
    ]
    return problems + _pattern_problems(model) + _expert_problems(model, family)


def _is_one_group(name: str, found: Any, value: Any) -> bool:
    """Return whether a field says one router group where the family has none."""
    groups = ("moe_router_num_groups", "moe_router_group_topk")
    return name in groups and (found, value) == (1, None)


def _pattern_problems(model: ModelConfig) -> list[str]:
    """Return where the mixers of layers are not what the keys make of them."""
    group = model.layer_group_size
    wanted_tokens = tuple(
        "lightning" if (index + 1) % group else "gqa" for index in range(model.num_layers)
    )
    wanted_channels = tuple(
        "dense" if index < model.first_k_dense_replace else "moe"
        for index in range(model.num_layers)
    )
    facts = {
        "token mixers do not follow model.layer_group_size": token_mixers(model) != wanted_tokens,
        "channel mixers do not follow model.first_k_dense_replace": (
            channel_mixers(model) != wanted_channels
        ),
    }
    return [text for text, is_wrong in facts.items() if is_wrong]


def _expert_problems(model: ModelConfig, family: Family) -> list[str]:
    """Return what of the experts and of their choice the format cannot say."""
    shared, width = model.num_shared_experts, model.moe_shared_expert_intermediate_size or 0
    groups, kept = model.moe_router_num_groups or 1, model.moe_router_group_topk or 1
    follows_routed = keys.SHARED_EXPERTS_LIKE_ROUTED in family.keys
    facts = {
        "it has no experts": model.num_moe_experts is None,
        "it has no shared expert": not shared or not width,
        "the shared experts do not divide their width": bool(shared and width % shared),
        f"model.moe_shared_expert_intermediate_size={width} is not model.num_shared_experts="
        f"{shared} times model.moe_ffn_hidden_size={model.moe_ffn_hidden_size}": (
            follows_routed and width != shared * model.moe_ffn_hidden_size
        ),
        "model.moe_router_topk must be 2 * model.moe_router_group_topk": (
            1 < groups != kept and model.moe_router_topk != 2 * kept
        ),
    }
    return [text for text, is_wrong in facts.items() if is_wrong]
