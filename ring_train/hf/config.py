"""`config.json` of a Hugging Face folder <-> ModelConfig.

Unusual: families are told apart by `architectures[0]` alone, because `model_type` is "bailing_moe"
for two of them; keys have no defaults, because those of the public code bite (model-spec 3.2); and
the decay rule of a linear model is never guessed.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ring_train.config import (
    Architecture,
    DecayLayerRule,
    ModelConfig,
    ScoreFunction,
    WeightFormat,
)
from ring_train.hf.errors import HfError
from ring_train.hf.family import FAMILIES, family_of, family_problems
from ring_train.hf.fp8 import dtype_keys, quantization_problems
from ring_train.hf.mtp import MTP_FOLDER
from ring_train.plan import context_tokens

INT_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "first_k_dense_replace",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_shared_experts",
    "eos_token_id",
    "pad_token_id",
)
"""Integer keys that every family needs."""

V2_INT_KEYS = ("head_dim", "n_group", "topk_group", "moe_shared_expert_intermediate_size")
LINEAR_INT_KEYS = ("layer_group_size", "group_norm_size")
FLOAT_KEYS = ("rms_norm_eps", "rope_theta")
V2_FLOAT_KEYS = ("partial_rotary_factor", "routed_scaling_factor")

ONLY_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_bias": False,
    "use_qkv_bias": False,
    "norm_topk_prob": True,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "attention_dropout": 0.0,
}
"""What the trainer implements; another value in a folder is refused, absence means this value."""

V2_ONLY_VALUES: dict[str, Any] = {
    "use_rmsnorm": True,
    "use_qk_norm": True,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
}
V1_ONLY_VALUES: dict[str, Any] = {"norm_softmax": False}

YARN_KEYS = ("factor", "original_max_position_embeddings")

V2_RECIPE: dict[str, Any] = {
    "moe_router_score_function": ScoreFunction.sigmoid,
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 1e-3,
    "moe_router_bias_zero_mean": True,
    "moe_z_loss_coeff": 3.5e-6,
    "moe_aux_loss_coeff": 0.0,
}
"""Training constants that no folder holds (model-spec 2.3)."""

V1_RECIPE: dict[str, Any] = {
    "moe_router_score_function": ScoreFunction.softmax,
    "moe_router_enable_expert_bias": False,
    "moe_router_bias_update_rate": 0.0,
    "moe_router_bias_zero_mean": False,
    "moe_z_loss_coeff": 0.0,
    "moe_aux_loss_coeff": 0.0,
}


def read_model_config(
    folder: str | Path, decay_layer_rule: DecayLayerRule | None = None
) -> ModelConfig:
    """Return the model that a folder's `config.json` describes.

    Args:
        folder: Hugging Face folder.
        decay_layer_rule: for a linear folder whose config does not say it, and only then.

    Raises:
        HfError: unreadable, unknown family, keys missing or contradictory, all named at once.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    architecture = family_of(path, raw)
    is_v1 = architecture == Architecture.bailing_moe
    is_linear = architecture == Architecture.bailing_moe_linear_v2
    if not is_v1 and "rotary_dim" in raw and raw.get("partial_rotary_factor") is None:
        raw = {**raw, "partial_rotary_factor": raw["rotary_dim"] / raw["head_dim"]}
    ints = INT_KEYS + (() if is_v1 else V2_INT_KEYS) + (LINEAR_INT_KEYS if is_linear else ())
    floats = FLOAT_KEYS + (() if is_v1 else V2_FLOAT_KEYS)
    problems = _value_problems(raw, ints, floats)
    problems += _only_problems(raw, V1_ONLY_VALUES if is_v1 else V2_ONLY_VALUES)
    problems += _rope_scaling_problems(raw.get("rope_scaling"))
    problems += quantization_problems(raw)
    if is_linear:
        problems += _only_problems(raw, {"linear_rope": True})
    if problems:
        raise HfError(f"{path}: {'; '.join(problems)}; correct config.json")
    rule = _decay_rule(path, raw, decay_layer_rule, is_linear=is_linear)
    model = _make_model(raw, architecture, rule)
    model = dataclasses.replace(model, mtp_num_layers=model.mtp_num_layers or _separate_mtp(path))
    problems = [] if is_v1 else family_problems(model)
    if problems:
        raise HfError(f"{path}: {'; '.join(problems)}; this is not a folder of its family")
    return model


def _separate_mtp(path: Path) -> int:
    """Return how many MTP depths lie in a folder of their own beside a `config.json`."""
    separate = path.parent / MTP_FOLDER / path.name
    if not separate.is_file():
        return 0
    depths = read_json(separate).get("num_nextn_predict_layers")
    if type(depths) is not int or depths < 1:
        raise HfError(
            f"{separate}: num_nextn_predict_layers={depths!r}, but a folder of MTP layers has at "
            "least one; correct it or remove the folder"
        )
    return depths


def _make_model(
    raw: dict[str, Any], architecture: Architecture, rule: DecayLayerRule
) -> ModelConfig:
    """Return the model of a checked `config.json`."""
    is_linear = architecture == Architecture.bailing_moe_linear_v2
    is_v1 = architecture == Architecture.bailing_moe
    specific = _v1_fields(raw) if is_v1 else _v2_fields(raw)
    return ModelConfig(
        architecture=architecture,
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        ffn_hidden_size=raw["intermediate_size"],
        num_attention_heads=raw["num_attention_heads"],
        num_query_groups=raw["num_key_value_heads"],
        vocab_size=raw["vocab_size"],
        max_position_embeddings=raw["max_position_embeddings"],
        layer_group_size=raw["layer_group_size"] if is_linear else 1,
        first_k_dense_replace=raw["first_k_dense_replace"],
        layernorm_epsilon=raw["rms_norm_eps"],
        init_method_std=raw.get("initializer_range", 0.006),
        rotary_base=float(raw["rope_theta"]),
        **_rope_scaling_fields(raw.get("rope_scaling")),
        group_norm_size=raw["group_norm_size"] if is_linear else 1,
        decay_layer_rule=rule,
        linear_silu=is_linear and raw.get("linear_silu", False),
        num_moe_experts=raw["num_experts"],
        moe_router_topk=raw["num_experts_per_tok"],
        moe_ffn_hidden_size=raw["moe_intermediate_size"],
        num_shared_experts=raw["num_shared_experts"],
        mtp_num_layers=raw.get("num_nextn_predict_layers") or 0,
        mtp_loss_scaling_factor=raw.get("mtp_loss_scaling_factor", 0.1),
        eos_token_id=raw["eos_token_id"],
        pad_token_id=raw["pad_token_id"],
        bos_token_id=raw.get("bos_token_id"),
        **specific,
    )


def _rope_scaling_problems(scaling: Any) -> list[str]:
    """Return what the trainer does not implement of a folder's rope_scaling."""
    if scaling is None:
        return []
    numbers: dict[str, Any] = (
        {key: scaling.get(key) for key in YARN_KEYS} if isinstance(scaling, dict) else {}
    )
    kind = scaling.get("rope_type", scaling.get("type")) if numbers else None
    others = set(scaling) - {*YARN_KEYS, "rope_type", "type"} if numbers else set()
    sound = all(type(x) in (int, float) and math.isfinite(x) and x > 1 for x in numbers.values())
    if kind == "yarn" and not others and sound:
        return []
    return [
        f"rope_scaling={scaling!r}, but only null and rope_type=yarn with "
        f"{' and '.join(YARN_KEYS)} are implemented"
    ]


def _rope_scaling_fields(scaling: dict[str, Any] | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    return {
        "rotary_scaling_factor": float(scaling["factor"]),
        "original_max_position_embeddings": int(scaling["original_max_position_embeddings"]),
    }


def _rope_scaling_dict(model: ModelConfig) -> dict[str, Any] | None:
    if model.rotary_scaling_factor == 1:
        return None
    return {
        "rope_type": "yarn",
        "factor": model.rotary_scaling_factor,
        "original_max_position_embeddings": model.original_max_position_embeddings,
    }


def _v2_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the V2 families spell, router groups of one as none."""
    has_groups = raw["n_group"] > 1
    shared_size = raw["num_shared_experts"] * raw["moe_shared_expert_intermediate_size"]
    return {
        "kv_channels": raw["head_dim"],
        "qk_layernorm": True,
        "rotary_percent": raw["partial_rotary_factor"],
        "moe_shared_expert_intermediate_size": shared_size or None,
        "moe_router_num_groups": raw["n_group"] if has_groups else None,
        "moe_router_group_topk": raw["topk_group"] if has_groups else None,
        "moe_router_topk_scaling_factor": raw["routed_scaling_factor"],
        "norm_head": False,
        **V2_RECIPE,
    }


def _v1_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that the first generation spells otherwise or not at all."""
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    shared_size = raw["num_shared_experts"] * raw["moe_intermediate_size"]
    return {
        "kv_channels": head_dim,
        "qk_layernorm": False,
        "rotary_percent": 1.0,
        "moe_shared_expert_intermediate_size": shared_size or None,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_router_topk_scaling_factor": raw.get("routed_scaling_factor", 1.0),
        "norm_head": raw.get("norm_head", False),
        **V1_RECIPE,
    }


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or raise HfError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HfError(f"{path} does not exist; give a Hugging Face model folder") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise HfError(f"{path} is not readable JSON ({error}); copy the folder again") from error
    if not isinstance(value, dict):
        raise HfError(f"{path} holds a {type(value).__name__}, not an object; copy it again")
    return value


def _value_problems(
    raw: dict[str, Any], ints: tuple[str, ...], floats: tuple[str, ...]
) -> list[str]:
    """Return one line per key that is missing or not a number."""
    missing = [key for key in (*ints, *floats) if raw.get(key) is None]
    problems = [f"missing keys {', '.join(missing)}"] if missing else []
    kinds: list[tuple[str, type | tuple[type, ...]]] = [(key, int) for key in ints]
    kinds += [(key, (int, float)) for key in floats]
    for key, kind in kinds:
        value = raw.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            problems.append(f"{key}={value!r} is not a number")
        elif value is not None and value < 0:
            problems.append(f"{key}={value!r} is negative")
    return problems


def _only_problems(raw: dict[str, Any], family_values: dict[str, Any]) -> list[str]:
    """Return one line per key whose value the trainer does not implement."""
    return [
        f"{key}={raw[key]!r}, but only {key}={only!r} is implemented"
        for key, only in {**ONLY_VALUES, **family_values}.items()
        if raw.get(key, only) != only
    ]


def _decay_rule(
    path: Path, raw: dict[str, Any], given: DecayLayerRule | None, *, is_linear: bool
) -> DecayLayerRule:
    """Return the rule that the folder or the caller states; both must not differ."""
    choices = [rule.value for rule in DecayLayerRule]
    if not is_linear:
        if given is not None:
            raise HfError(
                f"decay_layer_rule={given.value} was given, but {path} says "
                f"architectures[0]={raw['architectures'][0]!r}, which has no linear layers; "
                "leave decay_layer_rule out"
            )
        return DecayLayerRule.zero_based
    stated = raw.get("decay_layer_rule")
    if stated is None:
        if given is None:
            raise HfError(
                f"{path} has no decay_layer_rule, and no tensor of a checkpoint tells it: give "
                "decay_layer_rule=zero_based (layer l of L forgets with 1 - l/(L-1), as serving "
                "engines do; try it first) or decay_layer_rule=shifted (1 - (l-1)/(L-1), as the "
                "public remote code does), and confirm by the loss on real text"
            )
        return given
    if stated not in choices:
        raise HfError(f"{path}: decay_layer_rule={stated!r} is unknown; choose from {choices}")
    if given is not None and given != stated:
        raise HfError(
            f"decay_layer_rule={given.value} was given, but {path} says "
            f"decay_layer_rule={stated}; leave yours out, or correct config.json"
        )
    return DecayLayerRule(stated)


def hf_config_dict(model: ModelConfig, *, weights: WeightFormat) -> dict[str, Any]:
    """Return `config.json` of an export: every key of model-spec 3.2, none left to a default.

    Raises:
        HfError: the model is not of its family, all differences at once.
    """
    problems = family_problems(model)
    if problems:
        raise HfError(
            f"model.architecture={model.architecture.value} cannot be exported: "
            f"{'; '.join(problems)}; its folder format has no place for that"
        )
    assert model.moe_shared_expert_intermediate_size is not None
    family = FAMILIES[model.architecture]
    config = {
        "architectures": [family.architecture],
        "auto_map": family.auto_map,
        "model_type": family.model_type,
        **dtype_keys(weights, model.num_layers, model.mtp_num_layers),
        **ONLY_VALUES,
        **V2_ONLY_VALUES,
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": context_tokens(model, model.rotary_scaling_factor),
        "first_k_dense_replace": model.first_k_dense_replace,
        "rms_norm_eps": model.layernorm_epsilon,
        "initializer_range": model.init_method_std,
        "rope_theta": model.rotary_base,
        "rope_scaling": _rope_scaling_dict(model),
        "partial_rotary_factor": model.rotary_percent,
        "num_experts": model.num_moe_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "n_group": model.moe_router_num_groups or 1,
        "topk_group": model.moe_router_group_topk or 1,
        "routed_scaling_factor": model.moe_router_topk_scaling_factor,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "num_shared_experts": model.num_shared_experts,
        "moe_shared_expert_intermediate_size": (
            model.moe_shared_expert_intermediate_size // model.num_shared_experts
        ),
        "num_nextn_predict_layers": model.mtp_num_layers,
        "mtp_loss_scaling_factor": model.mtp_loss_scaling_factor,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.pad_token_id,
        "bos_token_id": model.bos_token_id,
        "use_cache": True,
    }
    if model.architecture == Architecture.bailing_moe_linear_v2:
        config["layer_group_size"] = model.layer_group_size
        config["group_norm_size"] = model.group_norm_size
        config["linear_silu"] = model.linear_silu
        config["linear_rope"] = True
        config["decay_layer_rule"] = model.decay_layer_rule.value
    return config


def generation_config_dict(model: ModelConfig, end_of_turn: int | None = None) -> dict[str, Any]:
    """Return `generation_config.json`; end_of_turn: special token after an answer in chat."""
    stops = {model.eos_token_id, model.eos_token_id if end_of_turn is None else end_of_turn}
    keys = {"eos_token_id": sorted(stops), "pad_token_id": model.pad_token_id}
    return keys if model.bos_token_id is None else {"bos_token_id": model.bos_token_id, **keys}
