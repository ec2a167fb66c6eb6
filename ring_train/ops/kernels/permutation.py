"""Triton kernels of the permutation of tokens: rows are copied, or the rows of a token added.

Bytes per token of width h in a 16-bit dtype with k experts: 2 h (k + 1) each way, where a row that
several experts read comes from the cache after the first.
"""

import triton
import triton.language as tl
from torch import Tensor

from ring_train.ops.kernels.launching import padded

BLOCK = 2048
"""Channels of a program, at most."""


@triton.jit
def _gather_kernel(x, slot, output, topk, channels, BLOCK: tl.constexpr):
    """Copy a block of the row of x that a slot names; zeros for slot -1."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(slot + row)
    token = (tl.maximum(found, 0) // topk).to(tl.int64)
    inside = column < channels
    value = tl.load(x + token * channels + column, mask=inside & (found >= 0), other=0.0)
    tl.store(output + row * channels + column, value, mask=inside)


@triton.jit
def _sum_kernel(y, rows, output, channels, TOPK: tl.constexpr, BLOCK: tl.constexpr):
    """Add a block of the rows of one token, in the order in which they are named."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < channels
    total = tl.zeros((BLOCK,), tl.float32)
    for number in tl.static_range(TOPK):
        row = tl.load(rows + token * TOPK + number).to(tl.int64)
        at = y + tl.maximum(row, 0) * channels + column
        total += tl.load(at, mask=inside & (row >= 0), other=0.0).to(tl.float32)
    tl.store(output + token * channels + column, total.to(output.dtype.element_ty), mask=inside)


def gather_rows(x: Tensor, slot: Tensor, topk: int) -> Tensor:
    """Return [m, h]: row slot // topk of x [t, h], contiguous; zeros for slot -1."""
    output = x.new_empty(slot.shape[0], x.shape[1])
    block = min(BLOCK, padded(x.shape[1]))
    if output.numel():
        _gather_kernel[(slot.shape[0], triton.cdiv(x.shape[1], block))](
            x,
            slot,
            output,
            topk,
            x.shape[1],
            BLOCK=block,  # pyrefly: ignore[bad-argument-type]  -- a constexpr
        )
    return output


def sum_rows(y: Tensor, rows: Tensor) -> Tensor:
    """Return [t, h]: the fp32 sum of the rows of y [m, h], contiguous, that rows [t, k] names."""
    output = y.new_empty(rows.shape[0], y.shape[1])
    block = min(BLOCK, padded(y.shape[1]))
    if output.numel():
        _sum_kernel[(rows.shape[0], triton.cdiv(y.shape[1], block))](
            y,
            rows,
            output,
            y.shape[1],
            TOPK=rows.shape[1],  # pyrefly: ignore[bad-argument-type]  -- a constexpr
            BLOCK=block,  # pyrefly: ignore[bad-argument-type]  -- a constexpr
        )
    return output
