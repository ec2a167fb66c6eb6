"""Norms: the order of rounding, groups, gates, and gradients."""

import inspect

import pytest
import torch
from torch import Tensor

from ring_train.ops.norm import gated_group_norm, rms_norm

EPS = 1e-6
TIGHT_FP64 = 1e-12  # values up to 1e1, a few roundings of 1e-16
ROUNDING_FP32 = 1e-6  # values up to 1e1, a few roundings of 6e-8 relative


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def gated_group_norm_reference(x: Tensor, gate: Tensor, weight: Tensor, num_groups: int) -> Tensor:
    """Group by group, in the dtype given."""
    size = x.shape[-1] // num_groups
    outputs = []
    for group in range(num_groups):
        part = x[:, group * size : (group + 1) * size]
        root = (part.pow(2).sum(-1, keepdim=True) / size + EPS).sqrt()
        outputs.append(part / root)
    return torch.cat(outputs, dim=-1) * weight / (1 + torch.exp(-gate))


def grads(output: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    weights = random(*output.shape, dtype=output.dtype, seed=9)
    return torch.autograd.grad(output, leaves, weights)


def test_rms_norm_and_its_gradients_equal_the_formula_in_fp64() -> None:
    x, weight = random(7, 3, 8).requires_grad_(), random(8, seed=1).requires_grad_()
    output = rms_norm(x, weight, EPS)
    expected = weight * x / (x.pow(2).sum(-1, keepdim=True) / 8 + EPS).sqrt()
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, expected, rtol=0, atol=TIGHT_FP64)
    for found, wanted in zip(grads(output, x, weight), grads(expected, x, weight), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=TIGHT_FP64)


def test_rms_norm_rounds_before_the_weight() -> None:
    x, weight = random(64, 32, dtype=torch.bfloat16), random(32, dtype=torch.bfloat16, seed=1)
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    assert torch.equal(rms_norm(x, weight, EPS), weight * wide.bfloat16())
    assert not torch.equal(rms_norm(x, weight, EPS), (weight.float() * wide).bfloat16())


def test_rms_norm_keeps_the_dtype_of_its_input_beside_an_fp32_weight() -> None:
    output = rms_norm(random(4, 8, dtype=torch.bfloat16), torch.ones(8), EPS)
    assert output.dtype == torch.bfloat16


def test_rms_norm_of_large_and_tiny_bf16_values_is_finite() -> None:
    for factor, size in ((1e30, None), (1e-4, 0.1)):
        x = factor * torch.ones(1, 8, dtype=torch.bfloat16)
        output = rms_norm(x if size else x / 1e14, torch.ones(8, dtype=torch.bfloat16), EPS)
        assert float(output[0, 0]) == pytest.approx(1.0 if size is None else size, rel=0.01)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 12])
def test_gated_group_norm_and_its_gradients_equal_the_formula_in_fp64(num_groups: int) -> None:
    leaves = [random(5, 12), random(5, 12, seed=1), random(12, seed=2)]
    x, gate, weight = (leaf.requires_grad_() for leaf in leaves)
    output = gated_group_norm(x, gate, weight, num_groups=num_groups, eps=EPS)
    expected = gated_group_norm_reference(x, gate, weight, num_groups)
    torch.testing.assert_close(output, expected, rtol=0, atol=TIGHT_FP64)
    found = grads(output, x, gate, weight)
    for name, grad, wanted in zip(
        ("x", "gate", "weight"), found, grads(expected, x, gate, weight), strict=True
    ):
        torch.testing.assert_close(
            grad, wanted, rtol=0, atol=TIGHT_FP64, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_group_norm_rounds_once_from_fp32(dtype: torch.dtype) -> None:
    x, gate, weight = (
        random(*s, dtype=dtype, seed=i) for i, s in enumerate([(9, 16), (9, 16), (16,)])
    )
    output = gated_group_norm(x, gate, weight, num_groups=4, eps=EPS)
    expected = gated_group_norm_reference(x.double(), gate.double(), weight.double(), 4)
    assert output.dtype == dtype
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(output.double(), expected, rtol=rounding, atol=ROUNDING_FP32)


def test_groups_of_a_shard_equal_the_groups_of_the_whole() -> None:
    x, gate, weight = random(5, 16), random(5, 16, seed=1), random(16, seed=2)
    whole = gated_group_norm(x, gate, weight, num_groups=4, eps=EPS)
    shards = [
        gated_group_norm(x[:, half], gate[:, half], weight[half], num_groups=2, eps=EPS)
        for half in (slice(0, 8), slice(8, 16))
    ]
    torch.testing.assert_close(torch.cat(shards, dim=-1), whole, rtol=0, atol=TIGHT_FP64)


def test_wrong_inputs_are_refused() -> None:
    x, weight = random(5, 12), random(12)
    norm, group_norm = inspect.unwrap(rms_norm), inspect.unwrap(gated_group_norm)
    with pytest.raises(ValueError, match="one weight per channel"):
        norm(x, random(11), EPS)
    with pytest.raises(ValueError, match="is not supported"):
        norm(x.long(), weight, EPS)
    with pytest.raises(ValueError, match="gate the shape of x"):
        group_norm(x, random(5, 6), weight, num_groups=2, eps=EPS)
    for num_groups in (0, 5):
        with pytest.raises(ValueError, match="does not divide 12 channels"):
            group_norm(x, x, weight, num_groups=num_groups, eps=EPS)
