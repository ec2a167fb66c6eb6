"""Keys of `config.json` and the fields of ModelConfig that they say, both ways.

A `Keys` is one row of the table in `ring_train.hf.family`: most say one field by one key; some
fields are spelled by several keys together or in another unit. No key has a default unless its row
says so, because those of the public code bite (model-spec 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ring_train.config import DecayLayerRule, ModelConfig
from ring_train.plan import context_tokens

Raw = dict[str, Any]
"""A parsed `config.json`, or a part of one."""

YARN_KEYS = ("factor", "original_max_position_embeddings")
MAY_BE_ZERO = frozenset(
    {
        *("first_k_dense_replace", "num_nextn_predict_layers", "mtp_loss_scaling_factor"),
        *("eos_token_id", "pad_token_id", "bos_token_id", "rms_norm_eps", "initializer_range"),
    }
)
"""The other numbers are above 0."""
MOST = {"num_hidden_layers": 2**16, "num_attention_heads": 2**16, "partial_rotary_factor": 1}
"""Lists of layers and heads are made before the weights are looked at, hence their bounds."""
MOST_OF_ALL = 2**31 - 1
"""Of the other numbers; transformers and serving engines count in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Some keys, and the fields that they say together."""

    fields: tuple[str, ...]
    """Of ModelConfig."""
    required: Mapping[str, type] = field(default_factory=dict)
    """Keys that a folder must have: int or float; see MAY_BE_ZERO and MOST."""
    optional: Mapping[str, type] = field(default_factory=dict)
    """Keys that may be absent or null."""
    read: Callable[[Raw], dict[str, Any]]
    """From a checked `config.json` to the fields."""
    write: Callable[[ModelConfig], Raw]
    """From a model to the keys; what is left out is said by absence."""

    @property
    def names(self) -> tuple[str, ...]:
        """All keys."""
        return (*self.required, *self.optional)

    def problems(self, raw: Raw) -> tuple[list[str], list[str]]:
        """Return (keys that are missing, what is wrong with the others) in a folder."""
        missing = [name for name in self.required if raw.get(name) is None]
        problems = [
            _value_problem(name, raw[name], kind)
            for name, kind in (*self.required.items(), *self.optional.items())
            if raw.get(name) is not None and kind is not object
        ]
        return missing, [problem for problem in problems if problem]


def _value_problem(name: str, value: Any, kind: type) -> str | None:
    """Return what is wrong with the value of a key."""
    if kind is bool:
        return None if isinstance(value, bool) else f"{name}={value!r} is not true or false"
    if isinstance(value, bool) or not isinstance(value, (int, kind)):
        whole = "whole " if isinstance(value, float) else ""
        return f"{name}={value!r} is not a {whole}number"
    may_be_zero, most = name in MAY_BE_ZERO, MOST.get(name, MOST_OF_ALL)
    if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
        return f"{name}={value!r} is {'negative' if may_be_zero else 'not positive'} or not finite"
    return f"{name}={value!r} is more than {most}" if value > most else None


def same(name: str, model_field: str, kind: type = int) -> Keys:
    """Return the row of a required key whose value is that of a field."""
    return Keys(
        fields=(model_field,),
        required={name: kind},
        read=lambda raw: {model_field: kind(raw[name])},
        write=lambda model: {name: getattr(model, model_field)},
    )


def absent_means(name: str, model_field: str, default: Any, kind: type = int) -> Keys:
    """Return the row of a key that is always written, and absent in some released folders."""
    return Keys(
        fields=(model_field,),
        optional={name: kind},
        read=lambda raw: {model_field: default if raw.get(name) is None else kind(raw[name])},
        write=lambda model: {name: getattr(model, model_field)},
    )


ROPE_BASE = Keys(
    fields=("rotary_base",),
    required={"rope_theta": float},
    read=lambda raw: {"rotary_base": float(raw["rope_theta"])},
    # Released folders have whole numbers here.
    write=lambda m: {"rope_theta": _whole(m.rotary_base)},
)
BEGINNING = Keys(
    fields=("bos_token_id",),
    optional={"bos_token_id": int},
    read=lambda raw: {"bos_token_id": raw.get("bos_token_id")},
    write=lambda m: {} if m.bos_token_id is None else {"bos_token_id": m.bos_token_id},
)
CONTEXT = Keys(
    fields=("max_position_embeddings",),
    required={"max_position_embeddings": int},
    read=lambda raw: {"max_position_embeddings": raw["max_position_embeddings"]},
    write=lambda m: {"max_position_embeddings": context_tokens(m, m.rotary_scaling_factor)},
)
YARN = Keys(
    fields=("rotary_scaling_factor", "original_max_position_embeddings"),
    optional={"rope_scaling": object},
    read=lambda raw: _yarn_fields(raw.get("rope_scaling")),
    write=lambda model: {"rope_scaling": _yarn_dict(model)},
)
ROUTER_GROUPS = Keys(
    fields=("moe_router_num_groups", "moe_router_group_topk"),
    required={"n_group": int, "topk_group": int},
    read=lambda raw: {  # one group is none
        "moe_router_num_groups": raw["n_group"] if raw["n_group"] > 1 else None,
        "moe_router_group_topk": raw["topk_group"] if raw["n_group"] > 1 else None,
    },
    write=lambda model: {
        "n_group": model.moe_router_num_groups or 1,
        "topk_group": model.moe_router_group_topk or 1,
    },
)
SHARED_EXPERTS_WITH_WIDTH = Keys(
    fields=("num_shared_experts", "moe_shared_expert_intermediate_size"),
    required={"num_shared_experts": int, "moe_shared_expert_intermediate_size": int},
    read=lambda raw: _shared(raw, "moe_shared_expert_intermediate_size"),
    write=lambda model: {
        "num_shared_experts": model.num_shared_experts,
        "moe_shared_expert_intermediate_size": (
            (model.moe_shared_expert_intermediate_size or 0) // model.num_shared_experts
        ),
    },
)
SHARED_EXPERTS_LIKE_ROUTED = Keys(
    fields=("num_shared_experts", "moe_shared_expert_intermediate_size"),
    required={"num_shared_experts": int},
    read=lambda raw: _shared(raw, "moe_intermediate_size"),
    write=lambda model: {"num_shared_experts": model.num_shared_experts},
)
HEAD_WIDTH_BY_DEFAULT = Keys(
    fields=("kv_channels",),
    optional={"head_dim": int},
    read=lambda raw: {
        "kv_channels": raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    },
    write=lambda m: (
        {}
        if m.kv_channels * m.num_attention_heads == m.hidden_size
        else {"head_dim": m.kv_channels}
    ),
)
DECAY_RULE = Keys(
    fields=("decay_layer_rule",),
    optional={"decay_layer_rule": object},
    read=lambda raw: {"decay_layer_rule": DecayLayerRule(raw["decay_layer_rule"])},
    write=lambda model: {"decay_layer_rule": model.decay_layer_rule.value},
)


def _head_width(model: ModelConfig) -> Raw:
    is_default = model.kv_channels * model.num_attention_heads == model.hidden_size
    return {} if is_default else {"head_dim": model.kv_channels}


def _whole(value: float) -> float | int:
    return int(value) if value.is_integer() else value


def _shared(raw: Raw, width_key: str) -> dict[str, Any]:
    """Return number and total width of the shared experts."""
    width = raw["num_shared_experts"] * raw[width_key]
    return {
        "num_shared_experts": raw["num_shared_experts"],
        "moe_shared_expert_intermediate_size": width or None,
    }


def yarn_problems(scaling: Any) -> list[str]:
    """Return what the trainer does not implement of a folder's rope_scaling."""
    if scaling is None:
        return []
    numbers: dict[str, Any] = (
        {key: scaling.get(key) for key in YARN_KEYS} if isinstance(scaling, dict) else {}
    )
    kind = scaling.get("rope_type", scaling.get("type")) if numbers else None
    others = set(scaling) - {*YARN_KEYS, "rope_type", "type"} if numbers else set()
    sound = all(type(x) in (int, float) and 1 < x <= MOST_OF_ALL for x in numbers.values())
    if kind == "yarn" and not others and sound:
        return []
    return [
        f"rope_scaling={scaling!r}, but only null and rope_type=yarn with "
        f"{' and '.join(YARN_KEYS)} are implemented"
    ]


def _yarn_fields(scaling: Raw | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    return {
        "rotary_scaling_factor": float(scaling["factor"]),
        "original_max_position_embeddings": int(scaling["original_max_position_embeddings"]),
    }


def _yarn_dict(model: ModelConfig) -> Raw | None:
    if model.rotary_scaling_factor == 1:
        return None
    return {
        "rope_type": "yarn",
        "factor": model.rotary_scaling_factor,
        "original_max_position_embeddings": model.original_max_position_embeddings,
    }
