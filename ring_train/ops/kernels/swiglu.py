"""Triton kernels of SwiGLU times a weight per row.

Bytes per row of width f in a 16-bit dtype: forward 6 f (read 2 f numbers, write f), backward 10 f.
"""

import triton
import triton.language as tl
from torch import Tensor

from ring_train.ops.kernels.launching import padded

BLOCK = 1024
"""Channels of one step of a program, at most."""


@triton.jit
def _forward_kernel(x, weights, output, channels, BLOCK: tl.constexpr):
    """Compute a block of channels of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    at = x + row * 2 * channels + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + channels, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights + row).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * weight
    tl.store(output + row * channels + column, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad, x, weights, grad_x, grad_weights, channels, BLOCK: tl.constexpr):
    """Compute both gradients of one row; that of its weight is a sum over all channels."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, channels, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < channels
        at = row * 2 * channels + column
        gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x + at + channels, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(grad + row * channels + column, mask=inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        total += dy * silu * up
        dgate = dy * weight * up * (share + silu * (1.0 - share))
        dup = dy * weight * silu
        tl.store(grad_x + at, dgate.to(grad_x.dtype.element_ty), mask=inside)
        tl.store(grad_x + at + channels, dup.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_weights + row, tl.sum(total, axis=0).to(grad_weights.dtype.element_ty))


def swiglu(x: Tensor, weights: Tensor) -> Tensor:
    """Return [m, f] of x [m, 2f] and weights [m], all contiguous."""
    rows, channels = x.shape[0], x.shape[1] // 2
    output = x.new_empty(rows, channels)
    block = min(BLOCK, padded(channels))
    if output.numel():
        _forward_kernel[(rows, triton.cdiv(channels, block))](
            x,
            weights,
            output,
            channels,
            BLOCK=block,  # pyrefly: ignore[bad-argument-type]  -- a constexpr
        )
    return output


def swiglu_gradient(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients (of x [m, 2f], of weights [m]) for grad [m, f], all contiguous."""
    rows, channels = grad.shape
    grad_x = x.new_empty(x.shape)
    grad_weights = weights.new_empty(rows)
    if grad.numel():
        _backward_kernel[(rows,)](
            grad,
            x,
            weights,
            grad_x,
            grad_weights,
            channels,
            BLOCK=min(BLOCK, padded(channels)),  # pyrefly: ignore[bad-argument-type]  -- a constexpr
        )
    return grad_x, grad_weights
