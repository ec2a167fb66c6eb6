"""Kernels of cross-entropy over a tile of logits; see `ring_train.ops.cross_entropy`.

Both read every logit once. Nothing is tuned by timing: the second overwrites what it reads, and the
first is bound by the same traffic.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ring_train.ops.kernels.launching import num_processors, padded

BLOCK = 4096
"""Logits of a row that a program holds at a time."""
NUM_WARPS = 8
PROGRAMS_PER_PROCESSOR = 8
"""Below this many, rows are cut into parts: two waves of the four that fit."""
LOWEST = tl.constexpr(-3.0e38)
"""Below every finite logit, and finite, so that the difference of two is a number."""


@triton.jit
def _statistics_kernel(
    logits,
    labels,
    statistics,
    stride,
    num_rows,
    num_columns,
    columns_per_part,
    BLOCK: tl.constexpr,
):
    """Leave largest logit, sum of exp, and the label's logit of one part of one row."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = part * columns_per_part
    stop = tl.minimum(start + columns_per_part, num_columns)
    values = logits + row * stride
    largest = tl.full((), LOWEST, tl.float32)
    total = tl.zeros((), tl.float32)
    for offset in range(start, stop, BLOCK):
        column = offset + tl.arange(0, BLOCK)
        x = tl.load(values + column, mask=column < stop, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), axis=0)
        largest = larger
    label = tl.load(labels + row)
    here = (label >= start) & (label < stop)
    found = tl.load(values + label, mask=here, other=0.0).to(tl.float32)
    at = statistics + part * 3 * num_rows + row
    tl.store(at, largest)
    tl.store(at + num_rows, total)
    tl.store(at + 2 * num_rows, found)


@triton.jit
def _gradient_kernel(logits, labels, log_sum_exp, grad, stride, num_columns, BLOCK: tl.constexpr):
    """Overwrite one block of one row by (softmax - one at the label) * grad."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits + row * stride + column
    x = tl.load(at, mask=column < num_columns, other=0.0).to(tl.float32)
    probability = tl.exp(x - tl.load(log_sum_exp + row))
    one = tl.where(column == tl.load(labels + row), 1.0, 0.0)
    value = (probability - one) * tl.load(grad + row)
    tl.store(at, value.to(logits.dtype.element_ty), mask=column < num_columns)


def make_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """Return [parts, 3, t] fp32 statistics of parts of the rows of logits [t, v].

    Args:
        logits: neighbouring ids side by side; rows may have gaps.
        labels: [t] int64.
    """
    rows, columns = logits.shape
    block = min(BLOCK, padded(columns))
    options: dict[str, Any] = {"BLOCK": block, "num_warps": NUM_WARPS}
    wanted = -(-PROGRAMS_PER_PROCESSOR * num_processors(logits.device) // max(rows, 1))
    blocks = -(-columns // block)
    per_part = -(-blocks // min(wanted, blocks)) * block
    parts = -(-columns // per_part)
    statistics = logits.new_empty(parts, 3, rows, dtype=torch.float32)
    _statistics_kernel[(rows, parts)](
        logits,
        labels,
        statistics,
        logits.stride(0),
        rows,
        columns,
        per_part,
        **options,
    )
    return statistics


def turn_into_gradient_(
    logits: Tensor, labels: Tensor, log_sum_exp: Tensor, grad: Tensor
) -> Tensor:
    """Return `logits` [t, v], overwritten by (softmax - one at the label) * grad [t]."""
    rows, columns = logits.shape
    block = min(BLOCK, padded(columns))
    options: dict[str, Any] = {"BLOCK": block, "num_warps": NUM_WARPS}
    _gradient_kernel[(rows, -(-columns // block))](
        logits,
        labels,
        log_sum_exp,
        grad,
        logits.stride(0),
        columns,
        **options,
    )
    return logits
