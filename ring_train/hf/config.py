"""`config.json` of a Hugging Face folder <-> ModelConfig.

Unusual: families are told apart by `architectures[0]` alone, because `model_type` is "bailing_moe"
for two of them; keys have no defaults, because those of the public code bite (model-spec 3.2); and
the decay rule of a linear model is never guessed.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ring_train.config import DecayLayerRule, ModelConfig, WeightFormat
from ring_train.hf.errors import HfError
from ring_train.hf.family import DERIVED_FIELDS, FAMILIES, Family, family_of, family_problems
from ring_train.hf.fp8 import dtype_keys, quantization_problems
from ring_train.hf.keys import DECAY_RULE, yarn_problems
from ring_train.hf.mtp import MTP_FOLDER
from ring_train.plan import context_tokens

LEAST_DIGITS_OF_FLOATS = 19
"""Of numbers in JSON that might not fit into 64 bits; Python reads no integers of 4301 digits."""


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
    raw = _with_rotary_factor(read_json(path))
    architecture = family_of(path, raw)
    family = FAMILIES[architecture]
    problems = _key_problems(raw, family)
    problems += yarn_problems(raw.get("rope_scaling")) + quantization_problems(raw)
    if problems:
        raise HfError(f"{path}: {'; '.join(problems)}; correct config.json")
    rule = _decay_rule(path, raw, decay_layer_rule, is_linear=DECAY_RULE in family.keys)
    raw = {**raw, "decay_layer_rule": rule}
    said: dict[str, Any] = {}
    for row in family.keys:
        said |= row.read(raw)
    model = ModelConfig(architecture=architecture, **said, **family.fixed, **family.unsaid)
    model = dataclasses.replace(model, mtp_num_layers=model.mtp_num_layers or _separate_mtp(path))
    problems = family_problems(model) + _head_problems(model)
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


def _with_rotary_factor(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a config whose `rotary_dim`, a name of the largest models, stands as a factor."""
    channels, width = raw.get("rotary_dim"), raw.get("head_dim")
    if raw.get("partial_rotary_factor") is not None or type(channels) is not int:
        return raw
    if type(width) is not int or width < 1:
        return raw
    return {**raw, "partial_rotary_factor": channels / width}


def _head_problems(model: ModelConfig) -> list[str]:
    """Return why heads cannot be laid out; `make_table` counts on it."""
    heads, groups = model.num_attention_heads, model.num_query_groups
    facts = {
        f"hidden_size={model.hidden_size} leaves no channel to one of num_attention_heads="
        f"{heads}": model.kv_channels == 0,
        f"num_attention_heads={heads} is not divisible by num_key_value_heads={groups}": (
            heads % groups != 0
        ),
    }
    return [text for text, is_wrong in facts.items() if is_wrong]


def _key_problems(raw: dict[str, Any], family: Family) -> list[str]:
    """Return what is missing, no number, or not implemented, one line each."""
    missing, wrong = [], []
    for row in family.keys:
        row_missing, row_wrong = row.problems(raw)
        missing += row_missing
        wrong += row_wrong
    wrong += [
        f"{key}={raw[key]!r}, but only {key}={only!r} is implemented"
        for key, only in {**family.always, **family.never_else}.items()
        if raw.get(key, only) != only
    ]
    return ([f"missing keys {', '.join(sorted(missing))}"] if missing else []) + wrong


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or raise HfError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
    except FileNotFoundError as error:
        raise HfError(f"{path} does not exist; give a Hugging Face model folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise HfError(f"{path} is not readable JSON ({error}); copy the folder again") from error
    if not isinstance(value, dict):
        raise HfError(f"{path} holds a {type(value).__name__}, not an object; copy it again")
    return value


def _integer(text: str) -> int | float:
    """Return a number of JSON; beyond 64 bits it is a float or infinite, as many readers do it."""
    return int(text) if len(text) < LEAST_DIGITS_OF_FLOATS else float(text)


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
    """Return `config.json` of an export: every key that consumers of the family need.

    Raises:
        HfError: the model is not of its family, all differences at once.
    """
    problems = family_problems(model)
    if problems:
        raise HfError(
            f"model.architecture={model.architecture.value} cannot be exported: "
            f"{'; '.join(problems)}; its folder format has no place for that"
        )
    family = FAMILIES[model.architecture]
    said: dict[str, Any] = {}
    for row in family.keys:
        said |= row.write(model)
    return {
        "architectures": [family.architecture],
        "auto_map": family.auto_map,
        "model_type": family.model_type,
        **dtype_keys(weights, model.num_layers, model.mtp_num_layers),
        **family.always,
        **family.carried,
        **said,
    }


def expressible_fields(model: ModelConfig) -> dict[str, Any]:
    """Return the fields that the folder of a model must say.

    One router group counts as none, and a context that is not stretched needs no original one.
    """
    unsaid = DERIVED_FIELDS | FAMILIES[model.architecture].unsaid.keys()
    fields = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(ModelConfig)
        if field.name not in unsaid
    }
    if model.moe_router_num_groups == 1:
        fields |= {"moe_router_num_groups": None, "moe_router_group_topk": None}
    if model.rotary_scaling_factor == 1:
        fields["original_max_position_embeddings"] = None
    fields["max_position_embeddings"] = context_tokens(model, model.rotary_scaling_factor)
    return fields


def generation_config_dict(model: ModelConfig, end_of_turn: int | None = None) -> dict[str, Any]:
    """Return `generation_config.json`; end_of_turn: special token after an answer in chat."""
    stops = {model.eos_token_id, model.eos_token_id if end_of_turn is None else end_of_turn}
    keys = {"eos_token_id": sorted(stops), "pad_token_id": model.pad_token_id}
    return keys if model.bos_token_id is None else {"bos_token_id": model.bos_token_id, **keys}
