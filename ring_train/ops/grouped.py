"""Linear maps of several groups of rows at once: one matrix for each group, as experts need.

torch's grouped product takes 16-bit and fp32 tensors whose rows begin at multiples of 16 bytes;
what it does not take is multiplied group by group. Its kernels leave rows behind the last group
unwritten, and so does this.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import grouped_mm

_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT_BYTES = 16


def grouped_linear(
    x: Float[Tensor, "m k"], weight: Float[Tensor, "e n k_too"], counts: Int[Tensor, " e_too"]
) -> Float[Tensor, "m n"]:
    """Return x times the transposed matrix of its group; rows behind the last group are undefined.

    Differentiable in `x` and `weight`; a group without rows has a gradient of zeros. In bf16 on a
    GPU the host does not wait for `counts`.

    Args:
        x: rows of the first group first.
        weight: one matrix per group, of the dtype of `x`.
        counts: rows of each group, on any device; they sum to m or less.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    if weight.shape[2] != x.shape[1] or counts.shape[0] != weight.shape[0]:
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and counts {tuple(counts.shape)} do "
            "not fit; give [rows, in], [groups, out, in] and [groups]"
        )
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(
            f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}; cast one"
        )
    return _GroupedLinear.apply(x, weight, counts)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ends = None
        if _is_grouped(x, weight):
            ends = counts.cumsum(0).to(x.device, torch.int32, non_blocking=True)
        ctx.save_for_backward(x, weight, counts, ends)
        return _products(x, weight.mT, counts, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, counts, ends = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x = _products(grad, weight, counts, ends) if ctx.needs_input_grad[0] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _outer_products(grad, x, counts, ends)
        return grad_x, grad_weight, None


def _is_grouped(x: Tensor, weight: Tensor) -> bool:
    """Return whether torch's grouped product takes these tensors and those of their gradients."""
    if x.dtype not in _GROUPED_DTYPES or not x.shape[0]:
        return False
    starts = [*weight.shape[1:], x.storage_offset(), weight.storage_offset()]
    contiguous = x.is_contiguous() and weight.is_contiguous()
    return contiguous and not any(n * x.element_size() % _ALIGNMENT_BYTES for n in starts)


def _products(x: Tensor, matrices: Tensor, counts: Tensor, ends: Tensor | None) -> Tensor:
    """Return [m, n]: the rows x [m, k] of each group times its matrix of [e, k, n]."""
    if ends is not None:
        return grouped_mm(x, matrices, offs=ends)
    output = x.new_empty(x.shape[0], matrices.shape[2])
    for matrix, rows in zip(matrices, _slices(counts), strict=True):
        torch.mm(x[rows], matrix, out=output[rows])
    return output


def _outer_products(grad: Tensor, x: Tensor, counts: Tensor, ends: Tensor | None) -> Tensor:
    """Return [e, n, k]: the sum over the rows of each group of grad [m, n] times x [m, k]."""
    if ends is None:
        output = x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])
        for matrix, rows in zip(output, _slices(counts), strict=True):
            torch.mm(grad[rows].mT, x[rows], out=matrix)
        return output
    # Transposed like this, no dimension that groups cut is contiguous: their sizes are free.
    output = grouped_mm(grad.mT, x, offs=ends)
    if x.is_cuda and torch.cuda.get_device_capability(x.device) != (9, 0):
        # Kernels for other GPUs than Hopper leave the matrix of an empty group unwritten
        # (https://github.com/pytorch/pytorch/issues/172439).
        output.masked_fill_((counts.to(x.device, non_blocking=True) == 0)[:, None, None], 0.0)
    return output


def _slices(counts: Tensor) -> list[slice]:
    ends = counts.cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
