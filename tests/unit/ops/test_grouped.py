"""Grouped products against one product per group: value, gradients, empty groups, odd sizes."""

import pytest
import torch
from torch import Tensor

from ring_train.ops import grouped
from ring_train.ops.grouped import grouped_linear
from ring_train.ops.swiglu import weighted_swiglu, weighted_swiglu_reference

ROUNDING_FP32 = 2e-6
"""Relative to the largest value: sums of some tens of products, each rounded to 6e-8."""
COUNTS = {"some": [3, 0, 5, 1], "one": [0, 0, 9, 0], "first": [9, 0, 0, 0], "none": [0, 0, 0, 0]}
SIZES = {"whole 16 bytes": (8, 12), "odd": (7, 5)}


def run(x: Tensor, weight: Tensor, counts: list[int], *, by_group: bool) -> dict[str, Tensor]:
    """Return the output in rows of a group, and the gradients of a fixed functional."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    if by_group:
        parts = x[: sum(counts)].split(counts)
        output = torch.cat([part @ matrix.mT for part, matrix in zip(parts, weight, strict=True)])
    else:
        output = grouped_linear(x, weight, torch.tensor(counts))[: sum(counts)]
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    return {"output": output, "x": x.grad[: sum(counts)], "weight": weight.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("spare", [0, 2])
def test_groups_are_multiplied_by_their_matrices(
    counts: str, sizes: str, spare: int, dtype: torch.dtype
) -> None:
    k, n = SIZES[sizes]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(sum(COUNTS[counts]) + spare, k, generator=generator, dtype=dtype)
    weight = torch.randn(len(COUNTS[counts]), n, k, generator=generator, dtype=dtype)
    is_grouped = dtype == torch.float32 and sizes != "odd" and bool(x.shape[0])
    assert grouped._is_grouped(x, weight) == is_grouped
    found = run(x, weight, COUNTS[counts], by_group=False)
    expected = run(x, weight, COUNTS[counts], by_group=True)
    for name, value in expected.items():
        tolerance = ROUNDING_FP32 * float(value.detach().abs().max()) if value.numel() else 0.0
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


def test_spare_rows_reach_no_gradient() -> None:
    x = torch.ones(6, 4)
    x[4:] = torch.nan
    x.requires_grad_()
    weight = torch.ones(2, 4, 4, requires_grad=True)
    output = grouped_linear(x, weight, torch.tensor([4, 0]))
    grad = torch.ones_like(output)
    grad[4:] = torch.nan
    output.backward(grad)
    assert weight.grad is not None
    assert weight.grad.tolist() == [[[4.0] * 4] * 4, [[0.0] * 4] * 4]


def test_a_part_of_a_tensor_that_begins_anywhere_is_multiplied() -> None:
    x = torch.randn(41)[1:].view(10, 4)
    weight = torch.randn(2, 4, 4)
    counts = torch.tensor([4, 6])
    assert not grouped._is_grouped(x, weight)
    found = grouped_linear(x, weight, counts)
    torch.testing.assert_close(found, grouped_linear(x.clone(), weight, counts))


def test_what_does_not_fit_is_refused() -> None:
    x, weight, counts = torch.zeros(4, 8), torch.zeros(2, 8, 8), torch.tensor([2, 2])
    with pytest.raises(ValueError, match=r"counts \(3,\) do not fit"):
        grouped_linear(x, weight, torch.tensor([2, 1, 1]))
    with pytest.raises(ValueError, match=r"weight \(2, 8, 4\) .* do not fit"):
        grouped_linear(x, weight[:, :, :4], counts)
    with pytest.raises(ValueError, match=r"weight torch.float64 .*cast one"):
        grouped_linear(x, weight.double(), counts)


@pytest.mark.parametrize("channels", [3, 32, 1100])
def test_triton_weighs_swiglu_like_torch(channels: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = 3 * torch.randn(4, 2 * channels, generator=generator)
    weights, grad = torch.randn(4, generator=generator), torch.randn(4, channels)
    results = []
    for dtype, backend in ((torch.float64, "torch"), (torch.float32, "triton")):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weights)]
        output = weighted_swiglu(*leaves, backend=backend)
        output.backward(grad.to(dtype))
        results.append([output, *(leaf.grad for leaf in leaves)])
    for name, expected, found in zip(("output", "x", "weights"), *results, strict=True):
        assert found.dtype == torch.float32
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error < ROUNDING_FP32, name


def test_swiglu_of_fp64_is_fp64() -> None:
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    found = float(weighted_swiglu(x, torch.tensor([3.0], dtype=torch.float64)))
    assert found == pytest.approx(6 / (1 + 2.718281828459045**-1), rel=1e-15)


def test_swiglu_of_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit; give an even"):
        weighted_swiglu(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="a weight per row"):
        weighted_swiglu(torch.zeros(2, 4), torch.zeros(3))


def test_swiglu_in_bf16_is_rounded_where_megatron_does() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(4)).bfloat16()
    weights = torch.rand(64, generator=torch.Generator().manual_seed(5))
    gate, up = x.chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * up
    expected = (inner * weights[:, None]).bfloat16()
    assert weighted_swiglu_reference(x, weights).equal(expected)
