import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ring_train.config import Architecture, DecayLayerRule, ModelConfig, WeightFormat, compose
from ring_train.hf.config import (
    expressible_fields,
    generation_config_dict,
    hf_config_dict,
    read_model_config,
)
from ring_train.hf.errors import HfError
from ring_train.hf.family import DERIVED_FIELDS, FAMILIES, family_of
from ring_train.hf.keys import MAY_BE_ZERO
from tests.unit.hf.conftest import GOLDEN, RULES

GoldenCopy = Callable[[str], Path]

# model-spec 3.2
V2_KEYS = {
    *("architectures", "auto_map", "model_type", "num_hidden_layers", "hidden_size"),
    *("intermediate_size", "eos_token_id", "pad_token_id", "first_k_dense_replace", "hidden_act"),
    *("max_position_embeddings", "moe_intermediate_size", "norm_topk_prob", "num_experts_per_tok"),
    *("num_attention_heads", "num_experts", "num_key_value_heads", "rope_theta", "rope_scaling"),
    *("tie_word_embeddings", "torch_dtype", "use_bias", "use_qkv_bias", "use_rmsnorm"),
    *("rms_norm_eps", "head_dim", "num_shared_experts", "use_cache", "embedding_dropout"),
    *("output_dropout", "attention_dropout", "vocab_size", "partial_rotary_factor"),
    *("router_dtype", "moe_router_enable_expert_bias", "routed_scaling_factor", "n_group"),
    *("topk_group", "use_qk_norm", "score_function", "moe_shared_expert_intermediate_size"),
    *("num_nextn_predict_layers", "mtp_loss_scaling_factor"),
}
LINEAR_KEYS = {"layer_group_size", "group_norm_size", "linear_silu", "decay_layer_rule"}
PRESETS = {
    "ring_mini_linear_2_0": Architecture.bailing_moe_linear_v2,
    "ring_flash_linear_2_0": Architecture.bailing_moe_linear_v2,
    "ling_mini_2_0": Architecture.bailing_moe_v2,
    "ling_flash_2_0": Architecture.bailing_moe_v2,
    "ling_1t": Architecture.bailing_moe_v2,
    "small": Architecture.bailing_moe_linear_v2,
    "tiny": Architecture.bailing_moe_linear_v2,
    "ring_lite": Architecture.bailing_moe,
    "ling_lite": Architecture.bailing_moe,
    "tiny_v1": Architecture.bailing_moe,
}


def edit(folder: Path, **values: Any) -> None:
    """Change keys of config.json; a value of `...` removes the key."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_its_config_json(preset: str, tmp_path: Path) -> None:
    model: ModelConfig = compose("pretrain", [f"model={preset}"]).model
    raw = hf_config_dict(model, weights=WeightFormat.bf16)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    again = read_model_config(tmp_path)
    assert again.architecture == PRESETS[preset]
    assert expressible_fields(again) == expressible_fields(model)


def test_recipe_fields_alone_are_not_in_a_folder(tiny: ModelConfig) -> None:
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    assert names - expressible_fields(tiny).keys() == {
        *("token_mixers", "channel_mixers", "megatron"),
        *("moe_router_bias_update_rate", "moe_router_bias_zero_mean"),
        *("moe_z_loss_coeff", "moe_aux_loss_coeff"),
    }


def test_config_json_has_every_key_of_the_specification(tiny: ModelConfig) -> None:
    raw = hf_config_dict(tiny, weights=WeightFormat.bf16)
    assert raw.keys() >= V2_KEYS | LINEAR_KEYS
    assert raw["architectures"] == ["BailingMoeLinearV2ForCausalLM"]
    assert raw["model_type"] == "bailing_moe_linear"
    assert raw["torch_dtype"] == "bfloat16"
    assert raw["decay_layer_rule"] == "zero_based"
    assert raw["auto_map"]["AutoConfig"] == (
        "configuration_bailing_moe_linear_v2.BailingMoeLinearV2Config"
    )


def test_a_softmax_model_is_called_bailing_moe_and_has_no_linear_keys() -> None:
    model = compose("pretrain", ["model=ling_mini_2_0"]).model
    raw = hf_config_dict(model, weights=WeightFormat.fp32)
    assert raw["model_type"] == "bailing_moe"
    assert raw["architectures"] == ["BailingMoeV2ForCausalLM"]
    assert raw["torch_dtype"] == "float32"
    assert raw.keys() >= V2_KEYS
    assert not raw.keys() & LINEAR_KEYS


def test_generation_stops_at_the_end_of_text(tiny: ModelConfig) -> None:
    model = dataclasses.replace(tiny, bos_token_id=None, eos_token_id=3, pad_token_id=4)
    assert generation_config_dict(model) == {"eos_token_id": [3], "pad_token_id": 4}


def test_golden_folders_read_as_what_their_readme_says() -> None:
    ling = read_model_config(GOLDEN / "ling_v2")
    assert (ling.architecture, ling.num_layers, ling.num_query_groups) == ("bailing_moe_v2", 4, 2)
    assert (ling.rotary_percent, ling.moe_router_group_topk, ling.mtp_num_layers) == (0.5, 1, 1)
    ring = read_model_config(GOLDEN / "ring_linear_v2", DecayLayerRule.shifted)
    assert (ring.layer_group_size, ring.group_norm_size) == (2, 2)
    assert ring.decay_layer_rule == DecayLayerRule.shifted
    lite = read_model_config(GOLDEN / "ring_lite_v1")
    assert (lite.architecture, lite.kv_channels, lite.norm_head) == ("bailing_moe", 32, True)
    assert (lite.moe_shared_expert_intermediate_size, lite.rotary_percent) == (64, 1.0)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_table_of_a_family_is_total_and_injective(architecture: Architecture) -> None:
    """Every field has one place, and so has every key."""
    family = FAMILIES[architecture]
    said = [name for row in family.keys for name in row.fields]
    places = [*said, *family.fixed, *family.unsaid, *DERIVED_FIELDS, "architecture"]
    assert sorted(places) == sorted(field.name for field in dataclasses.fields(ModelConfig))
    keys = [name for row in family.keys for name in row.names]
    keys += [*family.always, *family.never_else, *family.carried]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_key_of_a_family_is_written(architecture: Architecture) -> None:
    """Absent are keys that may be, where they say what absence does."""
    family = FAMILIES[architecture]
    preset = {value: key for key, value in PRESETS.items()}[architecture]
    model = compose("pretrain", [f"model={preset}"]).model
    changed = dataclasses.replace(model, bos_token_id=7, kv_channels=2 * model.kv_channels)
    raw = hf_config_dict(changed, weights=WeightFormat.bf16)
    rows = {name for row in family.keys for name in row.names}
    names = {"architectures", "auto_map", "model_type", "torch_dtype"}
    assert raw.keys() == names | rows | family.always.keys() | family.carried.keys()
    plain = hf_config_dict(dataclasses.replace(model, bos_token_id=None), weights=WeightFormat.bf16)
    assert raw.keys() - plain.keys() <= {"bos_token_id", "head_dim"}


def test_a_head_width_of_its_own_is_written_for_the_first_generation(tmp_path: Path) -> None:
    model = compose("pretrain", ["model=tiny_v1"]).model
    assert "head_dim" not in hf_config_dict(model, weights=WeightFormat.bf16)
    wider = dataclasses.replace(model, kv_channels=32)
    raw = hf_config_dict(wider, weights=WeightFormat.bf16)
    assert raw["head_dim"] == 32
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_model_config(tmp_path).kv_channels == 32


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"moe_shared_expert_intermediate_size": 64}, "64 is not model.num_shared_experts=2 times"),
        ({"qk_layernorm": True}, "qk_layernorm=True, but every"),
        ({"rotary_percent": 0.5}, "rotary_percent=0.5, but every"),
        ({"moe_router_topk_scaling_factor": 2.5}, "scaling_factor=2.5, but every"),
    ],
)
def test_the_first_generation_has_no_place_for_the_second(
    changes: dict[str, Any], match: str
) -> None:
    model = compose("pretrain", ["model=tiny_v1"]).model
    with pytest.raises(HfError, match=match):
        hf_config_dict(dataclasses.replace(model, **changes), weights=WeightFormat.bf16)


def test_the_family_is_told_by_architectures_alone(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")
    edit(folder, model_type="bailing_moe_linear")
    assert read_model_config(folder).architecture == Architecture.bailing_moe_v2


@pytest.mark.parametrize("names", [["LlamaForCausalLM"], [], None, "BailingMoeV2ForCausalLM"])
def test_an_unknown_architecture_is_refused(golden_copy: GoldenCopy, names: Any) -> None:
    folder = golden_copy("ling_v2")
    edit(folder, architectures=names)
    with pytest.raises(HfError, match=r"architectures=.*must be one of BailingMoeForCausalLM"):
        read_model_config(folder)


def test_all_missing_and_wrong_keys_are_named_at_once(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")
    edit(folder, routed_scaling_factor=..., n_group=..., num_experts="8", use_bias=True)
    with pytest.raises(HfError) as caught:
        read_model_config(folder)
    for text in (
        "missing keys n_group, routed_scaling_factor",
        "num_experts='8' is not a number",
        "use_bias=True, but only use_bias=False",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("ring_linear_v2", {"linear_rope": False}, "linear_rope=False, but only linear_rope=True"),
        ("ling_v2", {"rope_scaling": {"type": "yarn"}}, "only null and rope_type=yarn with"),
        ("ling_v2", {"score_function": "softmax"}, "only score_function='sigmoid'"),
        ("ring_lite_v1", {"norm_softmax": True}, "only norm_softmax=False"),
        ("ring_lite_v1", {"use_qk_norm": True}, "only use_qk_norm=False"),
        ("ring_lite_v1", {"norm_head": 1}, "norm_head=1 is not true or false"),
        ("ling_v2", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is negative or not finite"),
    ],
)
def test_what_the_trainer_does_not_implement_is_refused(
    golden_copy: GoldenCopy, name: str, values: dict[str, Any], match: str
) -> None:
    folder = golden_copy(name)
    edit(folder, **values)
    with pytest.raises(HfError, match=match):
        read_model_config(folder)


POSITIVE = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "num_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "max_position_embeddings", "rope_theta", "head_dim"),
    *("partial_rotary_factor", "routed_scaling_factor", "n_group", "topk_group"),
    *("num_shared_experts", "moe_shared_expert_intermediate_size"),
    *("layer_group_size", "group_norm_size"),
)


@pytest.mark.parametrize("name", RULES)
def test_every_number_is_positive_or_may_be_zero(
    golden_copy: GoldenCopy, tmp_path: Path, name: str
) -> None:
    """Every key is bad at once, and each is named with its value."""
    raw = json.loads((GOLDEN / name / "config.json").read_text())
    folder = golden_copy(name)
    family = FAMILIES[family_of(tmp_path, raw)]
    numbers = {
        key
        for row in family.keys
        for key, kind in {**row.required, **row.optional}.items()
        if kind in (int, float)
    }
    assert numbers - MAY_BE_ZERO == numbers & set(POSITIVE)
    for value in (0, -1, math.nan, math.inf):
        edit(folder, **dict.fromkeys(numbers, value))
        with pytest.raises(HfError) as caught:
            read_model_config(folder, RULES[name])
        for key in numbers - MAY_BE_ZERO if value == 0 else numbers:
            assert f"{key}={value!r} is " in str(caught.value)


HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("key", "text", "match"),
    [
        ("num_attention_heads", HUGE, "num_attention_heads=inf is not a whole number"),
        ("rope_theta", HUGE, "rope_theta=inf is not positive or not finite"),
        ("rope_theta", HUGE[:400], "rope_theta=inf is not positive or not finite"),
        ("hidden_size", "9" * 25, r"hidden_size=1e\+25 is not a whole number"),
        ("hidden_size", "9" * 18, "hidden_size=9{18} is more than 2147483647"),
        ("num_hidden_layers", "100000000", "num_hidden_layers=100000000 is more than 65536"),
        ("num_key_value_heads", "3", "num_attention_heads=4 is not divisible by num_key_value_h"),
        ("partial_rotary_factor", "1.5", "partial_rotary_factor=1.5 is more than 1"),
        (
            "rope_scaling",
            '{"rope_type": "yarn", "factor": 1e300, "original_max_position_embeddings": 1e300}',
            "only null and rope_type=yarn",
        ),
    ],
)
def test_numbers_that_no_model_has_are_refused(
    golden_copy: GoldenCopy, key: str, text: str, match: str
) -> None:
    folder = golden_copy("ling_v2")
    edit(folder, **{key: "HERE"})
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"HERE"', text))
    with pytest.raises(HfError, match=match):
        read_model_config(folder)


def test_heads_without_channels_are_refused(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ring_lite_v1")
    edit(folder, num_attention_heads=1024, num_key_value_heads=2)
    with pytest.raises(HfError, match="leaves no channel to one of num_attention_heads=1024"):
        read_model_config(folder)


def test_yarn_is_read_and_written(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ring_linear_v2")
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    edit(folder, rope_scaling=scaling, decay_layer_rule="zero_based", max_position_embeddings=256)
    model = read_model_config(folder)
    assert model.rotary_scaling_factor == 4
    assert model.original_max_position_embeddings == 64
    written = hf_config_dict(model, weights=WeightFormat.fp32)
    assert (written["rope_scaling"], written["max_position_embeddings"]) == (scaling, 256)
    shorter = dataclasses.replace(model, max_position_embeddings=64)
    assert hf_config_dict(shorter, weights=WeightFormat.fp32)["max_position_embeddings"] == 256


def test_rotary_dim_stands_for_the_factor(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")
    edit(folder, partial_rotary_factor=..., rotary_dim=8)
    assert read_model_config(folder).rotary_percent == 0.25


def test_a_router_that_the_format_means_otherwise_is_refused(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")
    edit(folder, num_experts_per_tok=3)
    with pytest.raises(HfError, match="moe_router_topk must be 2"):
        read_model_config(folder)


def test_one_router_group_is_none(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")
    edit(folder, n_group=1, topk_group=1)
    model = read_model_config(folder)
    assert (model.moe_router_num_groups, model.moe_router_group_topk) == (None, None)


def test_a_linear_folder_without_a_rule_demands_a_choice() -> None:
    with pytest.raises(HfError, match=r"decay_layer_rule=zero_based.*decay_layer_rule=shifted"):
        read_model_config(GOLDEN / "ring_linear_v2")


def test_a_rule_that_contradicts_the_folder_is_refused(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ring_linear_v2")
    edit(folder, decay_layer_rule="shifted")
    assert read_model_config(folder).decay_layer_rule == DecayLayerRule.shifted
    assert read_model_config(folder, DecayLayerRule.shifted) == read_model_config(folder)
    with pytest.raises(
        HfError, match=r"zero_based was given, but .* says decay_layer_rule=shifted"
    ):
        read_model_config(folder, DecayLayerRule.zero_based)


def test_an_unknown_rule_in_a_folder_is_refused(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ring_linear_v2")
    edit(folder, decay_layer_rule="one_based")
    with pytest.raises(HfError, match="decay_layer_rule='one_based' is unknown; choose from"):
        read_model_config(folder)


def test_a_rule_for_a_softmax_model_is_refused() -> None:
    with pytest.raises(HfError, match="has no linear layers; leave decay_layer_rule out"):
        read_model_config(GOLDEN / "ling_v2", DecayLayerRule.zero_based)


@pytest.mark.parametrize(
    ("text", "match"),
    [(None, "does not exist"), ("{", "is not readable JSON"), ("[1]", "holds a list")],
)
def test_a_folder_without_a_readable_config_is_refused(
    tmp_path: Path, text: str | None, match: str
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(HfError, match=match):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"token_mixers": ["gqa"] * 4}, "token mixers do not follow"),
        ({"channel_mixers": ["moe"] * 4}, "channel mixers do not follow"),
        ({"architecture": Architecture.bailing_moe_v2}, "layer_group_size=2, but every model of"),
        ({"architecture": Architecture.bailing_moe}, "mtp_num_layers=1, but every model of"),
        ({"num_moe_experts": None}, "it has no experts"),
        ({"moe_shared_expert_intermediate_size": None}, "it has no shared expert"),
        ({"num_shared_experts": 3}, "do not divide their width"),
        ({"moe_router_topk": 3}, "moe_router_topk must be 2"),
        ({"moe_router_enable_expert_bias": False}, "expert_bias=False, but every"),
        ({"qk_layernorm": False}, "qk_layernorm=False, but every"),
        ({"norm_head": True}, "norm_head=True, but every"),
    ],
)
def test_a_model_outside_its_family_cannot_be_exported(
    tiny: ModelConfig, changes: dict[str, Any], match: str
) -> None:
    model = dataclasses.replace(tiny, **changes)
    with pytest.raises(HfError, match=match):
        hf_config_dict(model, weights=WeightFormat.bf16)
