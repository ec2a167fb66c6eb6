"""What config.json means, by formulas written apart from those that train and export."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ring_train.config import ModelConfig, WeightFormat
from ring_train.hf.certificate.settings import (
    compare_config,
    compare_decay,
    compare_generation,
    compare_rope,
    compare_router,
    config_frequencies,
    config_slopes,
)
from ring_train.hf.config import hf_config_dict
from ring_train.ops.decay import decay_slopes
from ring_train.ops.rope import rotary_angles

RELATIVE = 1e-12
"""Both sides are in fp64."""


@pytest.fixture
def raw(tiny: ModelConfig) -> dict[str, Any]:
    return hf_config_dict(tiny, weights=WeightFormat.fp32)


@pytest.mark.parametrize("heads", [1, 3, 4, 16, 24, 32])
@pytest.mark.parametrize("rule", ["zero_based", "shifted"])
def test_slopes_of_a_config_are_the_trained_ones(heads: int, rule: str) -> None:
    raw = {"num_hidden_layers": 20, "num_attention_heads": heads, "layer_group_size": 5}
    for layer in (0, 1, 18):
        wanted = decay_slopes(heads, layer, 20, rule, torch.float64).tolist()
        found = config_slopes({**raw, "decay_layer_rule": rule}, layer)
        assert found == pytest.approx(wanted, rel=RELATIVE)
    assert config_slopes({**raw, "decay_layer_rule": rule}, 4) == []


@pytest.mark.parametrize("scaling", [None, (4.0, 32768), (40.0, 4096), (2.0, 16)])
def test_frequencies_of_a_config_are_the_trained_ones(scaling: tuple[float, int] | None) -> None:
    raw: dict[str, Any] = {"head_dim": 128, "partial_rotary_factor": 0.5, "rope_theta": 600000}
    if scaling is not None:
        keys = ("factor", "original_max_position_embeddings")
        raw["rope_scaling"] = dict(zip(keys, scaling, strict=True))
    frequencies, scale = config_frequencies(raw)
    angles = torch.tensor([*frequencies, *frequencies], dtype=torch.float64)
    cos, sin = rotary_angles(torch.tensor([1]), 64, 600000.0, torch.float64, scaling)
    torch.testing.assert_close(scale * angles.cos(), cos[0], rtol=RELATIVE, atol=RELATIVE)
    torch.testing.assert_close(scale * angles.sin(), sin[0], rtol=RELATIVE, atol=RELATIVE)


def test_every_key_of_a_config_is_compared(tiny: ModelConfig, raw: dict[str, Any]) -> None:
    assert compare_config(raw, raw)[0] == []
    for key, value in raw.items():
        less = {name: raw[name] for name in raw if name != key}
        assert compare_config(less, raw)[0] == [f"{key} is missing, not {value!r}"]
        assert len(compare_config({**raw, key: "other"}, raw)[0]) == 1, key
    further = {**raw, "lightning_layerwise_decay": False, "transformers_version": "4"}
    (line,) = compare_config(further, raw)[0]
    assert line.startswith("lightning_layerwise_decay is False")
    assert compare_config({**raw, "dtype": raw["torch_dtype"]}, raw)[0] == []
    (line,) = compare_config({**raw, "dtype": "float16"}, raw)[0]
    assert line == "dtype is 'float16', not 'float32' like torch_dtype"


def test_decay_of_config_and_of_the_loaded_model_are_named(
    tiny: ModelConfig, raw: dict[str, Any]
) -> None:
    right = {str(layer): config_slopes(raw, layer) for layer in range(tiny.num_layers)}
    right = {layer: slopes for layer, slopes in right.items() if slopes}
    assert compare_decay(raw, tiny, right)[0] == []
    assert compare_decay(raw, tiny, None)[0] == []
    wrong = {layer: [rate * 1.1 for rate in slopes] for layer, slopes in right.items()}
    differences = compare_decay(raw, tiny, wrong)[0]
    assert len(differences) == len(right)
    assert differences[0].startswith("layer 0: decay rates of the loaded model begin [")
    differences = compare_decay({**raw, "decay_layer_rule": "shifted"}, tiny, right)[0]
    assert differences[0].startswith("layer 0: decay rates of config.json begin [")
    last = str(tiny.num_layers - 1)
    assert compare_decay(raw, tiny, {**right, last: [1.0]})[0] == [
        f"layer {last} decays in the loaded model, not in training"
    ]


def test_positions_are_compared_channel_by_channel(tiny: ModelConfig, raw: dict[str, Any]) -> None:
    assert compare_rope(raw, tiny, None)[0] == []
    assert (
        "turns 32 channels" in compare_rope({**raw, "partial_rotary_factor": 2.0}, tiny, None)[0][0]
    )
    assert "cos of positions" in compare_rope({**raw, "rope_theta": 5e5}, tiny, None)[0][0]
    yarn = dataclasses.replace(tiny, rotary_scaling_factor=4.0, original_max_position_embeddings=64)
    assert compare_rope(raw, yarn, None)[0]
    stretched = hf_config_dict(yarn, weights=WeightFormat.fp32)
    assert compare_rope(stretched, yarn, None)[0] == []


def test_the_router_needs_every_bias_in_fp32(tiny: ModelConfig, raw: dict[str, Any]) -> None:
    layers = range(tiny.first_k_dense_replace, tiny.num_layers + tiny.mtp_num_layers)
    digests = {f"model.layers.{i}.mlp.gate.expert_bias": "abc" for i in layers}
    loaded = {name: {"dtype": "torch.float32", "sha256": "abc"} for name in digests}
    assert compare_router(raw, tiny, digests, loaded, loads_mtp=True)[0] == []
    first = next(iter(digests))
    for wrong, words in (
        ({"dtype": "torch.bfloat16", "sha256": "abc"}, "torch.bfloat16 in the loaded model"),
        ({"dtype": "torch.float32", "sha256": "xyz"}, "is not what the folder holds"),
    ):
        (line,) = compare_router(raw, tiny, digests, {**loaded, first: wrong}, loads_mtp=True)[0]
        assert line.startswith(first)
        assert words in line
    trunk = {k: v for k, v in loaded.items() if int(k.split(".")[2]) < tiny.num_layers}
    assert compare_router(raw, tiny, digests, trunk, loads_mtp=False)[0] == []
    assert len(compare_router(raw, tiny, digests, trunk, loads_mtp=True)[0]) == 1
    (line,) = compare_router(raw, tiny, {}, None, loads_mtp=True)[0]
    assert line == f"0 layers have an expert bias, {len(digests)} had in training"
    (line,) = compare_router({**raw, "topk_group": 7}, tiny, digests, None, loads_mtp=True)[0]
    assert line.startswith("topk_group is 7, trained was")


def test_stops_of_generation(tiny: ModelConfig, tmp_path: Path) -> None:
    def differences(**values: Any) -> list[str]:
        right = {"eos_token_id": [tiny.eos_token_id, 9], "bos_token_id": tiny.bos_token_id}
        content = {**right, "pad_token_id": tiny.pad_token_id, **values}
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
        return compare_generation(tmp_path, tiny, 9)[0]

    assert differences() == []
    assert "lacks 9, which ends a turn" in differences(eos_token_id=tiny.eos_token_id)[0]
    assert "holds 77" in differences(eos_token_id=[tiny.eos_token_id, 9, 77])[0]
    assert "pad_token_id is 5" in differences(pad_token_id=5)[0]
    assert differences(transformers_version="5.1") == []
    for key in ("repetition_penalty", "suppress_tokens", "max_new_tokens", "temperature"):
        assert differences(**{key: 7}) == [f"{key} is 7; an export does not write it"]
