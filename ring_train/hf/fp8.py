"""Block-FP8 weights: e4m3 with one fp32 scale for each 128 x 128 block.

`NAME` holds the values and `NAME_scale_inv` [ceil(rows / 128), ceil(columns / 128)] what they are
multiplied with (model-spec 3.1; inclusionAI/Ling-V2 @ af8837e,
tools/convert_dcp_to_safetensors.py, after deepseek-ai/DeepGEMM `per_block_cast_to_fp8`).
"""

from __future__ import annotations

from enum import StrEnum, auto
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ring_train.config import WeightFormat

FP8_DTYPE = torch.float8_e4m3fn
FP8_NAME = "F8_E4M3"
"""Word of the safetensors format."""
SCALE_SUFFIX = "_scale_inv"
BLOCK = 128
SMALLEST_AMAX = 1e-4
"""A block of smaller values is scaled as if this were its largest."""
LARGEST = torch.finfo(FP8_DTYPE).max  # 448

QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""`quantization_config` of config.json, as the released models have it."""


class Fp8Scale(StrEnum):
    """How the scale of a block follows from its largest value."""

    exact = auto()
    """amax / 448."""
    power_of_two = auto()
    """The next power of two, for kernels that hold scales as exponents."""


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape of the scales of a matrix."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def quantize(weight: Tensor, scale: Fp8Scale) -> tuple[Tensor, Tensor]:
    """Return (values e4m3 [r, c], scales fp32 [ceil(r/128), ceil(c/128)]) of a finite matrix."""
    blocks = _blocks(weight.float())  # [r/128, 128, c/128, 128]
    largest = blocks.abs().amax((1, 3)).clamp(min=SMALLEST_AMAX)
    scales = largest / LARGEST
    if scale is Fp8Scale.power_of_two:
        scales = torch.exp2(torch.ceil(torch.log2(scales)))
    values = (blocks / scales[:, None, :, None]).to(FP8_DTYPE)
    rows, columns = weight.shape
    return values.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scales


def dequantize(values: Tensor, scales: Tensor) -> Tensor:
    """Return the fp32 matrix [r, c] that values and scales stand for."""
    rows, columns = values.shape
    spread = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values.float() * spread


def _blocks(matrix: Tensor) -> Tensor:
    """Return a matrix in blocks [r/128, 128, c/128, 128], filled up with zeros."""
    rows, columns = matrix.shape
    padded = pad(matrix, (0, -columns % BLOCK, 0, -rows % BLOCK))
    return padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))


def quantization_dict(num_layers: int, num_mtp: int) -> dict[str, Any]:
    """Return `quantization_config` of a folder; it names the linear modules that stay bf16."""
    eh_proj = [f"model.layers.{index}.eh_proj" for index in range(num_layers, num_layers + num_mtp)]
    return {**QUANTIZATION, "modules_to_not_convert": ["lm_head", *eh_proj]}


def dtype_keys(weights: WeightFormat, num_layers: int, num_mtp: int) -> dict[str, Any]:
    """Return the keys of config.json that say in which dtype weights are."""
    if weights is WeightFormat.fp8:
        quantization = quantization_dict(num_layers, num_mtp)
        return {"torch_dtype": "bfloat16", "quantization_config": quantization}
    return {"torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[weights.value]}


def quantization_problems(raw: dict[str, Any]) -> list[str]:
    """Return what a `config.json` says about quantisation that is not implemented."""
    given = raw.get("quantization_config")
    if given is None:
        return []
    if not isinstance(given, dict):
        return [f"quantization_config={given!r} is no object"]
    return [
        f"quantization_config.{key}={given.get(key)!r}, but only {only!r} is implemented"
        for key, only in QUANTIZATION.items()
        if given.get(key, only if key != "quant_method" else None) != only
    ]
