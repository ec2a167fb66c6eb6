"""Block-FP8 folders: what is rounded, how far, and what a second reading finds."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ring_train.config import DecayLayerRule, WeightFormat
from ring_train.hf.config import read_model_config
from ring_train.hf.errors import HfError
from ring_train.hf.fp8 import BLOCK, FP8_DTYPE, Fp8Scale, dequantize, quantize, scale_shape
from ring_train.hf.reader import open_hf_folder
from ring_train.hf.writer import HfFormat, write_hf_folder
from tests.unit.hf.conftest import GOLDEN

HALF_STEP = 2.0**-4
"""e4m3 has three bits behind the point: the next value is at most 2^-3 of a value away."""
TWO_ULPS = 2.0**-22
"""Relative distance of fp32 numbers: of a scale, and of its product with a value."""
SUBNORMAL = 2.0**-10
"""Half of the smallest step of e4m3, in units of the scale."""


@pytest.mark.parametrize("scale", list(Fp8Scale))
@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (300, 129), (127, 256)])
def test_values_come_back_within_half_a_step(scale: Fp8Scale, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    values, scales = quantize(weight, scale)
    assert (values.dtype, values.shape) == (FP8_DTYPE, shape)
    assert (scales.dtype, tuple(scales.shape)) == (torch.float32, scale_shape(shape))
    spread = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    bound = weight.abs() * HALF_STEP + SUBNORMAL * spread[: shape[0], : shape[1]]
    assert ((dequantize(values, scales) - weight).abs() <= bound * (1 + 1e-6)).all()


def test_each_block_has_the_scale_of_its_own_largest_value() -> None:
    weight = torch.ones(256, 384)
    weight[128:, :128] = 100.0
    weight[:128, 256:] = 0.0
    _, scales = quantize(weight, Fp8Scale.exact)
    wanted = torch.tensor([[1.0, 1.0, 1e-4], [100.0, 1.0, 1.0]]) / 448
    torch.testing.assert_close(scales, wanted, rtol=1e-6, atol=0)


def test_powers_of_two_are_large_enough_and_no_larger() -> None:
    weight = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    _, exact = quantize(weight, Fp8Scale.exact)
    _, power = quantize(weight, Fp8Scale.power_of_two)
    assert torch.log2(power).frac().eq(0).all()
    assert ((power >= exact) & (power < 2 * exact)).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden hybrid in block FP8."""
    output = tmp_path_factory.mktemp("fp8") / "out"
    write(GOLDEN / "ring_linear_v2", output, DecayLayerRule.zero_based)
    return output


def write(source: Path, output: Path, rule: DecayLayerRule | None = None) -> None:
    model = read_model_config(source, rule)
    with open_hf_folder(source, model) as reader:
        form = HfFormat(weights=WeightFormat.fp8, max_shard_bytes=500_000)
        write_hf_folder(output, model, reader.read_logical, form=form, tokenizer_dir=source)


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def test_large_projections_are_rounded_and_nothing_else(folder: Path) -> None:
    tensors = contents(folder)
    rounded = {name for name, tensor in tensors.items() if tensor.dtype == FP8_DTYPE}
    kinds = {name.removesuffix(".weight").rsplit(".", 1)[1] for name in rounded}
    assert kinds == {"query_key_value", "dense", "g_proj", "gate_proj", "up_proj", "down_proj"}
    for name, tensor in tensors.items():
        if name in rounded:
            assert tensors[f"{name}_scale_inv"].shape == scale_shape(tuple(tensor.shape))
        elif name.endswith(("_scale_inv", "expert_bias")):
            assert tensor.dtype == torch.float32, name
        else:
            assert tensor.dtype == torch.bfloat16, name
            assert f"{name}_scale_inv" not in tensors


def test_scales_are_powers_of_two_where_the_released_models_have_them(folder: Path) -> None:
    tensors = contents(folder)
    for name, scales in tensors.items():
        if not name.endswith("_scale_inv"):
            continue
        expected = ".attention.dense." in name or (
            ".experts." in name and "shared" not in name and "down_proj" not in name
        )
        assert bool(torch.log2(scales).frac().eq(0).all()) == expected, name


def test_the_config_says_how_to_read_them(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.4.eh_proj"],
    }


def test_a_folder_written_from_itself_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    """What the values stand for stays; 448 * scale / 448 may round to the next number."""
    write(folder, tmp_path / "out")
    model = read_model_config(folder)
    with open_hf_folder(folder, model) as old, open_hf_folder(tmp_path / "out", model) as new:
        for name in old.table:
            before, after = old.read_logical(name), new.read_logical(name)
            torch.testing.assert_close(after, before, rtol=TWO_ULPS, atol=0)


def test_scales_that_are_missing_or_misshapen_are_named(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = read_model_config(folder)
    name = "model.layers.1.attention.dense.weight_scale_inv"
    for change, match in ((None, "1 tensors missing"), (torch.ones(2, 1), r"misshapen.*\[2, 1\]")):
        tensors = contents(folder)
        tensors.pop(name)
        if change is not None:
            tensors[name] = change
        target = tmp_path / match[:3]
        target.mkdir()
        save_file(tensors, target / "model.safetensors")
        (target / "config.json").write_text((folder / "config.json").read_text())
        with pytest.raises(HfError, match=match), open_hf_folder(target, model):
            pytest.fail("a damaged folder was opened")


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight_block_size", [64, 64]), ("fmt", "e5m2"), ("quant_method", "awq")],
)
def test_another_quantisation_is_refused(
    folder: Path, tmp_path: Path, key: str, value: object
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HfError, match=f"quantization_config.{key}=.*only"):
        read_model_config(tmp_path)
