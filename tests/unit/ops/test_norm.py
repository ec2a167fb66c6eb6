"""Norms: the order of rounding, groups, gates, gradients, and the Triton kernels."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_train.ops.kernels import norm as kernels
from ring_train.ops.norm import gated_group_norm, rms_norm

EPS = 1e-6
TIGHT_FP64 = 1e-12  # values up to 1e1, a few roundings of 1e-16
ROUNDING_FP32 = 1e-6  # values up to 1e1, a few roundings of 6e-8 relative
RELATIVE_FP32 = 1e-6  # of the largest value: a few roundings of 6e-8, sums of up to 100 terms
RELATIVE_FP16 = 2e-3  # of the largest value: up to three roundings to 2^-11 each
SAME_FRACTION = 0.999  # values equal bit by bit: rsqrt and sums may round otherwise, rarely


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


def run_norm(
    shape: tuple[int, ...], num_groups: int | None, dtype: torch.dtype, backend: str
) -> dict[str, Tensor]:
    """Return output and gradients of the gated norm, or of rms_norm with None groups."""
    leaves = {
        "x": random(*shape, dtype=dtype),
        "gate": 3 * random(*shape, dtype=dtype, seed=1),
        "weight": random(shape[-1], dtype=dtype, seed=2),
    }
    if num_groups is None:
        del leaves["gate"]
        x, weight = (leaf.requires_grad_() for leaf in leaves.values())
        output = rms_norm(x, weight, EPS, backend=backend)
    else:
        x, gate, weight = (leaf.requires_grad_() for leaf in leaves.values())
        output = gated_group_norm(x, gate, weight, num_groups=num_groups, eps=EPS, backend=backend)
    found = dict(zip(leaves, grads(output, *leaves.values()), strict=True))
    return {"output": output.detach()} | {f"grad of {name}": x for name, x in found.items()}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float) -> None:
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        assert x.shape == wanted[name].shape, name
        error = (x.double() - wanted[name].double()).abs().max()
        assert error <= relative * wanted[name].double().abs().max(), (name, float(error))


@pytest.mark.parametrize("shape", [(1, 8), (5, 24), (3, 2, 12), (2, 600), (70, 36)], ids=str)
@pytest.mark.parametrize("num_groups", [None, 1, 2])
def test_triton_norms_equal_torch_in_fp64(shape: tuple[int, ...], num_groups: int | None) -> None:
    found = run_norm(shape, num_groups, torch.float32, "triton")
    assert_close(found, run_norm(shape, num_groups, torch.float64, "torch"), RELATIVE_FP32)


@pytest.mark.parametrize("num_groups", [None, 1, 3])
def test_a_program_sums_over_blocks_of_rows(
    num_groups: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FORWARD_WARPS", "BACKWARD_WARPS"):
        monkeypatch.setattr(kernels, name, 2 * (num_groups or 1))
    monkeypatch.setattr(kernels, "BLOCK", 32)
    found = run_norm((9, 48), num_groups, torch.float32, "triton")
    assert_close(found, run_norm((9, 48), num_groups, torch.float64, "torch"), RELATIVE_FP32)


@pytest.mark.parametrize("num_groups", [None, 4])
def test_triton_norms_round_where_torch_does(num_groups: int | None) -> None:
    found = run_norm((50, 64), num_groups, torch.float16, "triton")
    wanted = run_norm((50, 64), num_groups, torch.float16, "torch")
    assert (found["output"] == wanted["output"]).double().mean() >= SAME_FRACTION
    assert {name: x.dtype for name, x in found.items()} == {n: x.dtype for n, x in wanted.items()}
    assert_close(found, wanted, RELATIVE_FP16)


def test_triton_norms_keep_the_dtype_of_their_input_beside_an_fp32_weight() -> None:
    x, weight = random(4, 8, dtype=torch.float16), random(8, dtype=torch.float32)
    for norm in (
        lambda backend: rms_norm(x, weight, EPS, backend=backend),
        lambda backend: gated_group_norm(x, x, weight, num_groups=2, eps=EPS, backend=backend),
    ):
        found, wanted = norm("triton"), norm("torch")
        assert found.dtype == torch.float16
        assert (found == wanted).double().mean() >= SAME_FRACTION


def test_triton_norms_read_inputs_with_gaps() -> None:
    x, gate = random(6, 16, dtype=torch.float32), random(6, 16, dtype=torch.float32, seed=1)
    weight = random(16, dtype=torch.float32, seed=2)
    found = gated_group_norm(
        x[::2, ::2], gate[::2, 8:], weight[::2], num_groups=2, eps=EPS, backend="triton"
    )
    wanted = gated_group_norm(
        x[::2, ::2], gate[::2, 8:], weight[::2], num_groups=2, eps=EPS, backend="torch"
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=ROUNDING_FP32)


def test_triton_norms_of_no_rows_are_empty() -> None:
    for num_groups in (None, 2):
        found = run_norm((0, 8), num_groups, torch.float32, "triton")
        assert found["output"].shape == (0, 8)
        assert not found["grad of weight"].any()


def test_triton_norms_keep_only_their_inputs() -> None:
    kept: list[Tensor] = []
    x, gate = random(4, 8, dtype=torch.float32), random(4, 8, dtype=torch.float32, seed=1)
    weight = random(8, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        gated_group_norm(x, gate, weight, num_groups=2, eps=EPS, backend="triton")
    assert [y.data_ptr() for y in kept] == [y.data_ptr() for y in (x, gate, weight)]


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


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"backend": "fla"}, "backend='fla' is unknown"),
        ({"gate": torch.zeros(5, 12).half()}, "takes one dtype, cast the gate"),
        ({"weight": torch.zeros(12, device="meta")}, "move them to one device"),
        (
            {"x": torch.zeros(5, 12).double(), "gate": torch.zeros(5, 12).double()},
            "does not compute torch.float64",
        ),
        (
            {
                "x": torch.zeros(1, 16385),
                "gate": torch.zeros(1, 16385),
                "weight": torch.zeros(16385),
            },
            "takes up to 16384, choose backend='torch'",
        ),
    ],
)
def test_inputs_that_triton_cannot_norm_are_refused(change: dict[str, Any], match: str) -> None:
    inputs: dict[str, Any] = {"x": torch.zeros(5, 12), "gate": torch.zeros(5, 12)}
    inputs |= {"weight": torch.zeros(12), "num_groups": 1, "eps": EPS, "backend": "triton"}
    with pytest.raises(ValueError, match=match):
        inspect.unwrap(gated_group_norm)(**(inputs | change))
