"""Adapters in PEFT's format, and their sum with the weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ring_train.config import LoraConfig, ModelConfig, WeightFormat
from ring_train.hf.adapters import adapted_names, read_adapter, read_merged
from ring_train.hf.errors import HfError
from ring_train.hf.peft import target_pattern, write_peft_folder
from ring_train.hf.table import make_table

RANK = 3
ROUNDING = 2e-5
"""Of sums of three products of normal numbers in fp32."""


def draw(model: ModelConfig, suffix: str) -> dict[str, torch.Tensor]:
    """Return weights and adapters of every table entry whose name ends so."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, entry in make_table(model).items():
        if name.endswith(suffix):
            rows, columns = entry.shape
            stem = name.removesuffix("weight")
            shapes = {"weight": (rows, columns), "lora_a": (RANK, columns), "lora_b": (rows, RANK)}
            for last, shape in shapes.items():
                tensors[stem + last] = torch.randn(shape, generator=generator)
    return tensors


@pytest.mark.parametrize("suffix", ["linear_qkv.weight", "linear_fc1.weight", "linear_proj.weight"])
def test_adapters_of_a_folder_make_the_merged_weights(
    suffix: str, tiny: ModelConfig, tmp_path: Path
) -> None:
    tensors = draw(tiny, suffix)
    names, adapted = adapted_names(tensors)
    assert names == adapted
    adapters = {name: read_adapter(name, tensors.__getitem__) for name in adapted}
    lora = LoraConfig(rank=RANK, alpha=2 * RANK, targets=["unread"])
    write_peft_folder(
        tmp_path / "out", tiny, lora, adapters, precision=WeightFormat.fp32, base_model="base"
    )
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    table = make_table(tiny)
    for name in names:
        merged = read_merged(name, tensors.__getitem__, adapted, scale=2.0)
        plain = table[name].to_hf(tensors[name])
        for hf_name, wanted in table[name].to_hf(merged).items():
            key = f"base_model.model.{hf_name.removesuffix('.weight')}."
            a, b = (stored.pop(f"{key}lora_{x}.weight") for x in "AB")
            torch.testing.assert_close(plain[hf_name] + 2.0 * b @ a, wanted, atol=ROUNDING, rtol=0)
    assert not stored
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, 2 * RANK)


def test_weights_without_an_adapter_stay_as_they_are(tiny: ModelConfig) -> None:
    tensors = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}
    tensors |= {"a.lora_a": torch.ones(1, 2), "a.lora_b": torch.ones(2, 1)}
    names, adapted = adapted_names(tensors)
    merged = {n: read_merged(n, tensors.__getitem__, adapted, scale=0.5) for n in names}
    assert merged["b.weight"] is tensors["b.weight"]
    assert merged["a.weight"].equal(torch.full((2, 2), 1.5))


def test_the_pattern_names_layers_one_by_one_and_all_experts() -> None:
    modules = [
        *(f"model.layers.{i}.attention.dense" for i in (0, 1, 10)),
        *(f"model.layers.1.mlp.experts.{j}.up_proj" for j in range(12)),
        "model.layers.0.mlp.up_proj",
    ]
    pattern = target_pattern(modules)
    assert all(re.fullmatch(pattern, module) for module in modules)
    for other in (
        *("model.layers.2.attention.dense", "model.layers.11.attention.dense"),
        *("model.layers.1.mlp.up_proj", "model.layers.0.mlp.experts.0.up_proj"),
        *("model.layers.0.attention_dense", "model.layers.0.attention.dense.weight"),
    ):
        assert not re.fullmatch(pattern, other), other


def test_an_existing_folder_is_left_alone(tiny: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    tensors = draw(tiny, "linear_gate.weight")
    _, adapted = adapted_names(tensors)
    adapters = {name: read_adapter(name, tensors.__getitem__) for name in adapted}
    lora = LoraConfig(rank=RANK, targets=["unread"])
    with pytest.raises(HfError, match="is not empty"):
        write_peft_folder(
            tmp_path, tiny, lora, adapters, precision=WeightFormat.fp32, base_model="base"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
