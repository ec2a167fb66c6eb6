"""Split of a fused projection, QK-norm and partial RoPE in Triton, one pass each way.

A program takes a few tokens and a few heads that are all queries, all keys or all values, so that
cosines are read once for several heads; a token of a head (d <= 128) lies in one warp. Values are
only copied (and given SiLU). A head is loaded as the two halves that rotate against each other and
the rest: each a run of neighbouring channels. Blocks and warps are constants: sums over channels,
and with them rounding, are the same on every rank and device, whatever a clock says.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
"""Tokens of a block."""
HEADS = 4
"""Heads of a program."""
WARPS = 2
MAX_REGISTERS = 128
"""Of a thread in the backward pass: what lets 16 warps share a multiprocessor."""
PROGRAMS = 2112
"""Programs of the backward pass: 16 for each multiprocessor of an H100. Each leaves one partial sum
of the gradient of a weight."""


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """Return fp32 `x` rounded to DTYPE, where the torch path rounds."""
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _load(at, rows, stride, column, num_tokens, SIZE: tl.constexpr, SILU: tl.constexpr):
    """Return some channels of a block of tokens in fp32, zero outside."""
    mask = (rows[:, None] < num_tokens) & (column[None, :] < SIZE)
    loaded = tl.load(at + rows.to(tl.int64)[:, None] * stride + column[None, :], mask, other=0.0)
    x = loaded.to(tl.float32)
    if SILU:
        x = _rounded(x * tl.sigmoid(x), loaded.dtype)
    return x


@triton.jit
def _store(at, rows, stride, column, num_tokens, x, SIZE: tl.constexpr):
    mask = (rows[:, None] < num_tokens) & (column[None, :] < SIZE)
    at += rows.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(at, x.to(at.dtype.element_ty), mask)


@triton.jit
def _silu_slope(at, rows, stride, column, num_tokens, SIZE: tl.constexpr):
    """Return the derivative of SiLU at the channels that `_load` reads."""
    x = _load(at, rows, stride, column, num_tokens, SIZE, False)
    gate = tl.sigmoid(x)
    return gate * (1.0 + x * (1.0 - gate))


@triton.jit
def _angles(at, rows, column, num_tokens, DTYPE: tl.constexpr, HALF: tl.constexpr):
    """Return cosines (or sines) of both halves, rounded as the torch path does."""
    low = _load(at, rows, 2 * HALF, column, num_tokens, HALF, False)
    high = _load(at + HALF, rows, 2 * HALF, column, num_tokens, HALF, False)
    return _rounded(low, DTYPE), _rounded(high, DTYPE)


@triton.jit
def _weights(at, column, SIZE: tl.constexpr):
    return tl.load(at + column, column < SIZE, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _kind(chunk, num_groups, heads_per_group, HEADS: tl.constexpr):
    """Return (is query, is value, first head, past the last head) of a program."""
    q_chunks = tl.cdiv(num_groups * heads_per_group, HEADS)
    k_chunks = tl.cdiv(num_groups, HEADS)
    is_query, is_value = chunk < q_chunks, chunk >= q_chunks + k_chunks
    before = tl.where(is_query, 0, tl.where(is_value, q_chunks + k_chunks, q_chunks))
    first = (chunk - before) * HEADS
    heads = tl.where(is_query, num_groups * heads_per_group, num_groups)
    return is_query, is_value, first, tl.minimum(first + HEADS, heads), heads


@triton.jit
def _slot(head, heads_per_group, is_query, is_value):
    """Return where a head lies in a token of the fused projection, in heads."""
    of_query = head // heads_per_group * (heads_per_group + 2) + head % heads_per_group
    last = tl.where(is_value, heads_per_group + 1, heads_per_group)
    return tl.where(is_query, of_query, head * (heads_per_group + 2) + last)


@triton.jit
def _forward_kernel(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    q,
    k,
    v,
    num_tokens,
    num_groups,
    heads_per_group,
    num_chunks,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SILU: tl.constexpr,
):
    """Write some heads of some tokens."""
    REST: tl.constexpr = D - 2 * HALF
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    rows = tl.program_id(0) // num_chunks * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(0) % num_chunks
    is_query, is_value, first, stop, heads = _kind(chunk, num_groups, heads_per_group, HEADS)
    stride, out_stride = num_groups * (heads_per_group + 2) * D, heads * D
    if is_value:
        channel = tl.arange(0, BLOCK_D)
        for head in range(first, stop):
            x_at = qkv + _slot(head, heads_per_group, is_query, is_value) * D
            x = _load(x_at, rows, stride, channel, num_tokens, D, SILU)
            _store(v + head * D, rows, out_stride, channel, num_tokens, x, D)
    else:
        half, rest = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_REST)
        cos_low, cos_high = _angles(cos, rows, half, num_tokens, DTYPE, HALF)
        sin_low, sin_high = _angles(sin, rows, half, num_tokens, DTYPE, HALF)
        out = tl.where(is_query, q, k)
        w_low, w_high, w_rest = 1.0, 1.0, 1.0
        if HAS_NORM:
            weight = tl.where(is_query, q_weight, k_weight)
            w_low, w_high = _weights(weight, half, HALF), _weights(weight + HALF, half, HALF)
            w_rest = _weights(weight + 2 * HALF, rest, REST)
        for head in range(first, stop):
            x_at = qkv + _slot(head, heads_per_group, is_query, is_value) * D
            low = _load(x_at, rows, stride, half, num_tokens, HALF, SILU)
            high = _load(x_at + HALF, rows, stride, half, num_tokens, HALF, SILU)
            tail = _load(x_at + 2 * HALF, rows, stride, rest, num_tokens, REST, SILU)
            if HAS_NORM:
                square = tl.sum(low * low + high * high, 1)
                square += tl.sum(tail * tail, 1)
                scale = tl.rsqrt(square / D + eps)[:, None]
                low = _rounded(_rounded(low * scale, DTYPE) * w_low, DTYPE)
                high = _rounded(_rounded(high * scale, DTYPE) * w_high, DTYPE)
                tail = _rounded(tail * scale, DTYPE) * w_rest
            turned = _rounded(low * cos_low, DTYPE) - _rounded(high * sin_low, DTYPE)
            other = _rounded(high * cos_high, DTYPE) + _rounded(low * sin_high, DTYPE)
            out_at = out + head * D
            _store(out_at, rows, out_stride, half, num_tokens, turned, HALF)
            _store(out_at + HALF, rows, out_stride, half, num_tokens, other, HALF)
            _store(out_at + 2 * HALF, rows, out_stride, rest, num_tokens, tail, REST)


@triton.jit
def _backward_kernel(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    q_grad,
    k_grad,
    v_grad,
    grad,
    weight_sums,
    num_tokens,
    num_groups,
    heads_per_group,
    num_chunks,
    num_programs,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SILU: tl.constexpr,
):
    """Write the gradient of some heads, for every num_programs-th block of tokens."""
    REST: tl.constexpr = D - 2 * HALF
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    program, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    num_blocks = tl.cdiv(num_tokens, ROWS)
    is_query, is_value, first, stop, heads = _kind(chunk, num_groups, heads_per_group, HEADS)
    stride, out_stride = num_groups * (heads_per_group + 2) * D, heads * D
    if is_value:
        channel = tl.arange(0, BLOCK_D)
        for block in range(program, num_blocks, num_programs):
            rows = block * ROWS + tl.arange(0, ROWS)
            for head in range(first, stop):
                at = _slot(head, heads_per_group, is_query, is_value) * D
                given = _load(v_grad + head * D, rows, out_stride, channel, num_tokens, D, False)
                if SILU:
                    given *= _silu_slope(qkv + at, rows, stride, channel, num_tokens, D)
                _store(grad + at, rows, stride, channel, num_tokens, given, D)
    else:
        half, rest = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_REST)
        given_at = tl.where(is_query, q_grad, k_grad)
        w_low, w_high, w_rest = 1.0, 1.0, 1.0
        sum_low = tl.zeros((ROWS, BLOCK_HALF), tl.float32)
        sum_high = tl.zeros((ROWS, BLOCK_HALF), tl.float32)
        sum_rest = tl.zeros((ROWS, BLOCK_REST), tl.float32)
        if HAS_NORM:
            weight = tl.where(is_query, q_weight, k_weight)
            w_low, w_high = _weights(weight, half, HALF), _weights(weight + HALF, half, HALF)
            w_rest = _weights(weight + 2 * HALF, rest, REST)
        for block in range(program, num_blocks, num_programs):
            rows = block * ROWS + tl.arange(0, ROWS)
            cos_low, cos_high = _angles(cos, rows, half, num_tokens, DTYPE, HALF)
            sin_low, sin_high = _angles(sin, rows, half, num_tokens, DTYPE, HALF)
            for head in range(first, stop):
                at = _slot(head, heads_per_group, is_query, is_value) * D
                out_at = given_at + head * D
                turned = _load(out_at, rows, out_stride, half, num_tokens, HALF, False)
                other = _load(out_at + HALF, rows, out_stride, half, num_tokens, HALF, False)
                low = turned * cos_low + other * sin_high
                high = other * cos_high - turned * sin_low
                tail = _load(out_at + 2 * HALF, rows, out_stride, rest, num_tokens, REST, False)
                if HAS_NORM:
                    x_at = qkv + at
                    x_low = _load(x_at, rows, stride, half, num_tokens, HALF, SILU)
                    x_high = _load(x_at + HALF, rows, stride, half, num_tokens, HALF, SILU)
                    square = tl.sum(x_low * x_low + x_high * x_high, 1)
                    x_rest = _load(x_at + 2 * HALF, rows, stride, rest, num_tokens, REST, SILU)
                    square += tl.sum(x_rest * x_rest, 1)
                    scale = tl.rsqrt(square / D + eps)[:, None]
                    x_low, x_high = x_low * scale, x_high * scale
                    sum_low += low * x_low
                    sum_high += high * x_high
                    low, high = low * w_low, high * w_high
                    along = tl.sum(low * x_low + high * x_high, 1)
                    x_rest = x_rest * scale
                    sum_rest += tail * x_rest
                    tail = tail * w_rest
                    along += tl.sum(tail * x_rest, 1)
                    along = (along / D)[:, None]
                    low, high = scale * (low - x_low * along), scale * (high - x_high * along)
                    tail = scale * (tail - x_rest * along)
                if SILU:
                    low *= _silu_slope(qkv + at, rows, stride, half, num_tokens, HALF)
                    high *= _silu_slope(qkv + at + HALF, rows, stride, half, num_tokens, HALF)
                _store(grad + at, rows, stride, half, num_tokens, low, HALF)
                _store(grad + at + HALF, rows, stride, half, num_tokens, high, HALF)
                rest_at = at + 2 * HALF
                if SILU:
                    tail *= _silu_slope(qkv + rest_at, rows, stride, rest, num_tokens, REST)
                _store(grad + rest_at, rows, stride, rest, num_tokens, tail, REST)
        if HAS_NORM:
            sums = weight_sums + tl.program_id(0).to(tl.int64) * D
            tl.store(sums + half, tl.sum(sum_low, 0), half < HALF)
            tl.store(sums + HALF + half, tl.sum(sum_high, 0), half < HALF)
            tl.store(sums + 2 * HALF + rest, tl.sum(sum_rest, 0), rest < REST)


def split_heads(
    qkv: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [t, n, d], k [t, g, d] and v [t, g, d]; arguments as in the op, contiguous."""
    t, groups, slots, d = qkv.shape
    q, k, v = (qkv.new_empty(t, heads, d) for heads in (groups * (slots - 2), groups, groups))
    chunks = sum(_chunks(qkv))
    if t:
        _forward_kernel[(-(-t // ROWS) * chunks,)](
            qkv,
            *(weights or (None, None)),
            cos,
            sin,
            q,
            k,
            v,
            t,
            groups,
            slots - 2,
            chunks,
            eps,
            **_shape(qkv, cos, weights, silu),
        )
    return q, k, v


def join_gradients(
    qkv: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    *,
    eps: float,
    silu: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Return the gradients of `qkv` and, in fp32, of the weights, from those of q, k and v."""
    t, groups, slots, d = qkv.shape
    q_chunks, k_chunks, v_chunks = _chunks(qkv)
    chunks = q_chunks + k_chunks + v_chunks
    programs = max(1, min(-(-t // ROWS), -(-PROGRAMS // chunks)))
    limit: dict[str, Any] = {"maxnreg": MAX_REGISTERS} if d <= 128 else {}
    grad = qkv.new_empty(qkv.shape)
    sums = None
    if weights is not None:
        sums = qkv.new_empty(programs, chunks, d, dtype=torch.float32)
    _backward_kernel[(programs * chunks,)](
        qkv,
        *(weights or (None, None)),
        cos,
        sin,
        *grads,
        grad,
        sums,
        t,
        groups,
        slots - 2,
        chunks,
        programs,
        eps,
        **_shape(qkv, cos, weights, silu),
        **limit,
    )
    if sums is None:
        return grad, None
    q_sums, k_sums = sums[:, :q_chunks], sums[:, q_chunks : q_chunks + k_chunks]
    return grad, (q_sums.sum((0, 1)), k_sums.sum((0, 1)))


def _chunks(qkv: Tensor) -> tuple[int, int, int]:
    """Return the programs that a block of tokens needs for queries, keys and values."""
    groups, slots = qkv.shape[1:3]
    keys = -(-groups // HEADS)
    return -(-groups * (slots - 2) // HEADS), keys, keys


def _shape(
    qkv: Tensor, cos: Tensor, weights: tuple[Tensor, Tensor] | None, silu: bool
) -> dict[str, Any]:
    """Return what both kernels are compiled for."""
    d, half = qkv.shape[3], cos.shape[1] // 2
    return {
        "D": d,
        "HALF": half,
        "BLOCK_D": triton.next_power_of_2(d),
        "BLOCK_HALF": triton.next_power_of_2(half),
        "BLOCK_REST": triton.next_power_of_2(max(1, d - 2 * half)),
        "ROWS": ROWS,
        "HEADS": HEADS,
        "HAS_NORM": weights is not None,
        "SILU": silu,
        "num_warps": WARPS,
    }
