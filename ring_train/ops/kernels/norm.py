"""Root-mean-square norms in Triton, with groups and a gate or without, one pass each way.

A program holds one group of some rows at a time and goes through every num_programs-th block of
rows; the sum of the weight's gradient stays in registers until the end. Blocks and warps follow
from the size of a group alone: sums over channels, and with them rounding, are the same on every
rank and device, whatever a clock says.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512
"""Elements of a warp: 16 of a thread."""
FORWARD_WARPS, BACKWARD_WARPS = 4224, 2112
"""Warps of one pass: 32 and 16 for each multiprocessor of an H100, as registers allow. Each program
leaves, in the backward pass, one partial sum of the gradient of a weight."""


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """Return fp32 `x` rounded to DTYPE, where the torch path rounds."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _forward_kernel(
    x,
    gate,
    weight,
    output,
    num_rows,
    num_groups,
    num_programs,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Write one group of every num_programs-th block of rows."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    program, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    channel = tl.arange(0, BLOCK)
    inside = channel[None, :] < SIZE
    w = tl.load(weight + group * SIZE + channel, channel < SIZE, other=0.0).to(tl.float32)[None, :]
    for block in range(program, tl.cdiv(num_rows, ROWS), num_programs):
        rows = block * ROWS + tl.arange(0, ROWS)
        mask = (rows[:, None] < num_rows) & inside
        at = (rows.to(tl.int64)[:, None] * num_groups + group) * SIZE + channel[None, :]
        value = tl.load(x + at, mask, other=0.0).to(tl.float32)
        opened = 1.0
        if GATED:
            opened = tl.sigmoid(tl.load(gate + at, mask, other=0.0).to(tl.float32))
        value *= tl.rsqrt(tl.sum(value * value, 1) / SIZE + eps)[:, None]
        value = value * w * opened if GATED else _rounded(value, DTYPE) * w
        tl.store(output + at, value.to(DTYPE), mask)


@triton.jit
def _backward_kernel(
    x,
    gate,
    weight,
    grad,
    x_grad,
    gate_grad,
    weight_sums,
    num_rows,
    num_groups,
    num_programs,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Write the gradients of one group of every num_programs-th block of rows."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    program, group = tl.program_id(0) // num_groups, tl.program_id(0) % num_groups
    channel = tl.arange(0, BLOCK)
    inside = channel[None, :] < SIZE
    w = tl.load(weight + group * SIZE + channel, channel < SIZE, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in range(program, tl.cdiv(num_rows, ROWS), num_programs):
        rows = block * ROWS + tl.arange(0, ROWS)
        mask = (rows[:, None] < num_rows) & inside
        at = (rows.to(tl.int64)[:, None] * num_groups + group) * SIZE + channel[None, :]
        value = tl.load(x + at, mask, other=0.0).to(tl.float32)
        given = tl.load(grad + at, mask, other=0.0).to(tl.float32)
        opened = 1.0
        if GATED:
            opened = tl.sigmoid(tl.load(gate + at, mask, other=0.0).to(tl.float32))
        scale = tl.rsqrt(tl.sum(value * value, 1) / SIZE + eps)[:, None]
        value *= scale
        if GATED:
            of_gate = given * value * w * opened * (1.0 - opened)
            tl.store(gate_grad + at, of_gate.to(DTYPE), mask)
            given *= opened
        total += given * value
        given *= w
        along = (tl.sum(given * value, 1) / SIZE)[:, None]
        tl.store(x_grad + at, (scale * (given - value * along)).to(DTYPE), mask)
    sums = weight_sums + (program.to(tl.int64) * num_groups + group) * SIZE
    tl.store(sums + channel, tl.sum(total, 0), channel < SIZE)


def normalise(
    x: Tensor, gate: Tensor | None, weight: Tensor, *, num_groups: int, eps: float
) -> Tensor:
    """Return `gated_group_norm`, or `rms_norm` without a gate, of rows x [t, m], all contiguous."""
    output = torch.empty_like(x)
    programs, shape = _shape(x, gate, num_groups, FORWARD_WARPS)
    _forward_kernel[(programs * num_groups,)](
        x,
        gate,
        weight,
        output,
        x.shape[0],
        num_groups,
        programs,
        eps,
        **shape,
    )
    return output


def normalise_gradients(
    x: Tensor, gate: Tensor | None, weight: Tensor, grad: Tensor, *, num_groups: int, eps: float
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the gradients of x, of the gate if there is one, and, in fp32, of the weight."""
    x_grad = torch.empty_like(x)
    gate_grad = None if gate is None else torch.empty_like(x)
    programs, shape = _shape(x, gate, num_groups, BACKWARD_WARPS)
    sums = x.new_empty(programs, x.shape[1], dtype=torch.float32)
    _backward_kernel[(programs * num_groups,)](
        x,
        gate,
        weight,
        grad,
        x_grad,
        gate_grad,
        sums,
        x.shape[0],
        num_groups,
        programs,
        eps,
        **shape,
    )
    return x_grad, gate_grad, sums.sum(0)


def _shape(
    x: Tensor, gate: Tensor | None, num_groups: int, all_warps: int
) -> tuple[int, dict[str, Any]]:
    """Return the programs of each group, and what a kernel is compiled for."""
    size = x.shape[1] // num_groups
    block = 1 << (size - 1).bit_length()
    rows = max(1, BLOCK // block)
    # A thread has 16 elements of each tensor, until 32 warps cannot hold so few.
    warps = min(32, max(1, block // BLOCK))
    programs = max(1, min(-(-x.shape[0] // rows), -(-all_warps // (num_groups * warps))))
    shape = {"SIZE": size, "BLOCK": block, "ROWS": rows, "num_warps": warps}
    return programs, shape | {"GATED": gate is not None}
