"""Rotary embedding: the angles of Hugging Face, rotation of pairs, untouched channels."""

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ring_train.ops.rope import apply_partial_rope, rotary_angles

TIGHT_FP64 = 1e-12  # values of order 1, a few roundings of 1e-16


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("base", [10_000.0, 600_000.0])
def test_angles_are_bit_equal_to_hugging_face_in_fp32(base: float) -> None:
    positions = torch.tensor([0, 1, 2, 77, 4095, 32767])
    inv_freq = 1.0 / (base ** (torch.arange(0, 64, 2, dtype=torch.int64).float() / 64))
    freqs = (inv_freq[None, :, None] @ positions[None, None, :].float()).transpose(1, 2)[0]
    expected = torch.cat((freqs, freqs), dim=-1)  # as transformers, modeling_llama.py, has it
    for found, wanted in zip(
        rotary_angles(positions, 64, base), (expected.cos(), expected.sin()), strict=True
    ):
        assert found.dtype == torch.float32
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("dim", "base", "factor", "context"),
    [(64, 1e4, 4.0, 32768), (128, 6e5, 4.0, 32768), (16, 1e4, 8.0, 64), (64, 1e6, 16.0, 4096)],
)
def test_yarn_is_bit_equal_to_transformers(
    dim: int, base: float, factor: float, context: int
) -> None:
    config: Any = PretrainedConfig()
    config.head_dim, config.hidden_size, config.num_attention_heads = 2 * dim, 4 * dim, 2
    config.max_position_embeddings = 1
    config.rope_parameters = {
        **{"rope_type": "yarn", "rope_theta": base, "factor": factor},
        **{"original_max_position_embeddings": context, "partial_rotary_factor": 0.5},
    }
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    positions = torch.arange(0, 5000, 7)
    angles = positions[:, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    cos, sin = rotary_angles(positions, dim, base, yarn=(factor, context))
    assert torch.equal(cos, angles.cos() * attention_factor)
    assert torch.equal(sin, angles.sin() * attention_factor)


def test_angles_follow_the_formula_in_fp64() -> None:
    positions = torch.tensor([3, 0, 100_000])
    cos, sin = rotary_angles(positions, 6, 1e4, dtype=torch.float64)
    for row, position in enumerate(positions.tolist()):
        for j in range(6):
            angle = position * 1e4 ** (-2 * (j % 3) / 6)
            assert float(cos[row, j]) == pytest.approx(math.cos(angle), abs=1e-10)
            assert float(sin[row, j]) == pytest.approx(math.sin(angle), abs=1e-10)


def test_pairs_are_rotated_and_other_channels_unchanged() -> None:
    x = random(5, 2, 10)
    cos, sin = rotary_angles(torch.arange(5) * 3, 6, 1e4, dtype=torch.float64)
    rotated = apply_partial_rope(x, cos, sin)
    assert torch.equal(rotated[..., 6:], x[..., 6:])
    pairs = torch.complex(x[..., :3], x[..., 3:6]) * torch.complex(cos, sin)[:, None, :3]
    torch.testing.assert_close(rotated[..., :3], pairs.real, rtol=0, atol=TIGHT_FP64)
    torch.testing.assert_close(rotated[..., 3:6], pairs.imag, rtol=0, atol=TIGHT_FP64)


def test_all_channels_may_rotate() -> None:
    x = random(4, 1, 6)
    cos, sin = rotary_angles(torch.arange(4), 6, 1e4, dtype=torch.float64)
    rotated = apply_partial_rope(x, cos, sin)
    assert rotated.shape == x.shape
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=0, atol=TIGHT_FP64)


def test_scores_depend_on_the_distance_alone() -> None:
    q, k = random(1, 1, 8).expand(6, 1, 8), random(1, 1, 8, seed=1).expand(6, 1, 8)
    cos, sin = rotary_angles(torch.tensor([0, 1, 2, 10, 11, 12]), 4, 1e4, dtype=torch.float64)
    scores = apply_partial_rope(q, cos, sin)[:, 0] @ apply_partial_rope(k, cos, sin)[:, 0].T
    torch.testing.assert_close(scores[:3, :3], scores[3:, 3:], rtol=0, atol=TIGHT_FP64)
    assert abs(float(scores[0, 2] - scores[2, 0])) > 1e-3


def test_gradient_is_the_inverse_rotation() -> None:
    x, weights = random(5, 2, 10).requires_grad_(), random(5, 2, 10, seed=1)
    cos, sin = rotary_angles(torch.arange(5), 6, 1e4, dtype=torch.float64)
    (grad,) = torch.autograd.grad(apply_partial_rope(x, cos, sin), x, weights)
    expected = apply_partial_rope(weights, cos, -sin)
    torch.testing.assert_close(grad, expected, rtol=0, atol=TIGHT_FP64)


def test_bf16_input_stays_bf16() -> None:
    cos, sin = rotary_angles(torch.arange(5), 6, 1e4)
    x = random(5, 2, 10).bfloat16()
    rotated = apply_partial_rope(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated[0], x[0])


def test_wrong_inputs_are_refused() -> None:
    angles, apply = inspect.unwrap(rotary_angles), inspect.unwrap(apply_partial_rope)
    cos, sin = rotary_angles(torch.arange(5), 6, 1e4)
    for rotary_dim in (0, 5):
        with pytest.raises(ValueError, match="does not pair channels"):
            angles(torch.arange(5), rotary_dim, 1e4)
    for position_ids in (torch.arange(5.0), torch.zeros(1, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match="one int64 per token"):
            angles(position_ids, 6, 1e4)
    with pytest.raises(ValueError, match="is not supported"):
        angles(torch.arange(5), 6, 1e4, torch.int64)
    for x in (torch.zeros(4, 2, 10), torch.zeros(5, 2, 4)):
        with pytest.raises(ValueError, match="do not fit"):
            apply(x, cos, sin)
    with pytest.raises(ValueError, match="is not supported"):
        apply(torch.zeros(5, 2, 10, dtype=torch.int32), cos, sin)
