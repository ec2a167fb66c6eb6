"""Kernels of the router: products in the precision of fp32, and the choice of experts with weights.

The product is one kernel for logits and both gradients. The rows of a routing fit in registers, one
token's experts in as many lanes, so that the choice needs no memory between its steps.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ring_train.ops.kernels.launching import dot_precision, num_processors, padded, tuned

SUM_FLOOR = tl.constexpr(1e-20)
LANES = 2048
"""Lanes of the tokens that a program routes."""
MAX_LANES = 4096
"""A token's experts, groups padded to powers of two, beyond which registers would not do."""


class Choice(NamedTuple):
    """Who is chosen, and what it weighs; see `ring_train.ops.router`."""

    softmax: bool
    """Of all logits; else sigmoid of each."""
    topk: int
    num_groups: int
    """1 without groups."""
    group_topk: int
    scaling_factor: float

    @property
    def group_lanes(self) -> int:
        """Groups, padded."""
        return _power_of_two(self.num_groups)

    def lanes(self, experts: int) -> int:
        """Return the lanes of a token."""
        return self.group_lanes * _power_of_two(experts // self.num_groups)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


@triton.jit
def dot_split(x, y, total):
    """Return total + x @ y of fp32 x and 16-bit y: x is split into three numbers of y's dtype.

    Three numbers of 8 bits (bf16) or more hold the 24 of fp32, and their products are exact in
    fp32, so nothing is lost but what sums lose.
    """
    high = x.to(y.dtype)
    rest = x - high.to(tl.float32)
    middle = rest.to(y.dtype)
    low = (rest - middle.to(tl.float32)).to(y.dtype)
    total = tl.dot(low, y, total)
    total = tl.dot(middle, y, total)
    return tl.dot(high, y, total)


@tuned(["num_columns", "num_inner"], (4, 3), (8, 3), (8, 4), first=(4, 4))
@triton.jit
def _product_kernel(
    a,
    b,
    c,
    num_rows,
    num_columns,
    num_inner,
    inner_per_part,
    a_stride_row,
    a_stride_inner,
    b_stride_inner,
    b_stride_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    SPLIT_A: tl.constexpr,
    SPLIT_B: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Leave one block of one part of a @ b, the part being a range of what is summed over."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    part = tl.program_id(2)
    start = part * inner_per_part
    stop = tl.minimum(start + inner_per_part, num_inner)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for offset in range(start, stop, BLOCK_INNER):
        inner = offset + tl.arange(0, BLOCK_INNER).to(tl.int64)
        x = tl.load(
            a + row[:, None] * a_stride_row + inner[None, :] * a_stride_inner,
            mask=(row[:, None] < num_rows) & (inner[None, :] < stop),
            other=0.0,
        )
        y = tl.load(
            b + inner[:, None] * b_stride_inner + column[None, :] * b_stride_column,
            mask=(inner[:, None] < stop) & (column[None, :] < num_columns),
            other=0.0,
        )
        if SPLIT_A:
            total = dot_split(x, y, total)
        elif SPLIT_B:
            total = tl.trans(dot_split(tl.trans(y), tl.trans(x), tl.trans(total)))
        elif x.dtype == y.dtype:
            total = tl.dot(x, y, total, input_precision=PRECISION)
        else:
            total = tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision=PRECISION)
    at = part.to(tl.int64) * num_rows * num_columns + row[:, None] * num_columns + column[None, :]
    inside = (row[:, None] < num_rows) & (column[None, :] < num_columns)
    tl.store(c + at, total.to(c.dtype.element_ty), mask=inside)


def make_product(a: Tensor, b: Tensor, dtype: torch.dtype, parts: int = 1) -> Tensor:
    """Return a @ b [m, n] in `dtype`, of fp32 precision whatever the dtypes.

    Args:
        a: [m, k].
        b: [k, n].
        dtype: of the result.
        parts: of k, summed one after the other: for a long k.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    wide = torch.float32 in (a.dtype, b.dtype)
    block_inner = 32 if wide else 64
    block_rows = min(64, padded(rows))
    block_columns = min(128, padded(columns))
    blocks = -(-inner // block_inner)
    per_part = -(-blocks // parts) * block_inner
    parts = -(-inner // per_part)
    constants: dict[str, Any] = {
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "BLOCK_INNER": block_inner,
        "SPLIT_A": a.dtype == torch.float32 and b.dtype == torch.bfloat16,
        "SPLIT_B": b.dtype == torch.float32 and a.dtype == torch.bfloat16,
        "PRECISION": dot_precision(torch.float32 if wide else a.dtype),
    }
    c = a.new_empty(parts, rows, columns, dtype=dtype if parts == 1 else torch.float32)
    _product_kernel[(-(-rows // block_rows), -(-columns // block_columns), parts)](
        a,
        b,
        c,
        rows,
        columns,
        inner,
        per_part,
        *a.stride(),
        *b.stride(),
        **constants,
    )
    return c[0] if parts == 1 else c.sum(0).to(dtype)


def make_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return logits [t, e] fp32 of x [t, h] and weight [e, h]."""
    return make_product(x, weight.t(), torch.float32)


def make_input_gradient(grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient [t, h] of the input, of that [t, e] of the logits."""
    return make_product(grad, weight, dtype)


def make_weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient [e, h] of the weight; tokens are summed in parts, in their order."""
    blocks = -(-grad.shape[1] // 64) * -(-x.shape[1] // 128)
    parts = -(-2 * num_processors(x.device) // blocks)
    return make_product(grad.t(), x, dtype, min(parts, -(-x.shape[0] // 256)))


@triton.jit
def _scores(x, exists, SOFTMAX: tl.constexpr):
    """Return the scores of logits [tokens, lanes]; 0 in lanes without an expert."""
    if SOFTMAX:
        x = tl.where(exists, x, float("-inf"))
        power = tl.exp(x - tl.max(x, axis=1)[:, None])
        score = tl.div_rn(power, tl.broadcast_to(tl.sum(power, axis=1)[:, None], power.shape))
    else:
        score = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + tl.exp(-x))
    return tl.where(exists, score, 0.0)


@triton.jit
def _routing_kernel(
    logits,
    bias,
    weights,
    chosen,
    num_tokens,
    num_experts,
    scaling_factor,
    NUM_GROUPS: tl.constexpr,
    GROUP_TOPK: tl.constexpr,
    TOPK: tl.constexpr,
    GROUP_LANES: tl.constexpr,
    EXPERT_LANES: tl.constexpr,
    TOKENS: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """Leave weights and choice of some tokens. Lanes are in the order of experts, with gaps."""
    LANES: tl.constexpr = GROUP_LANES * EXPERT_LANES
    group_size = num_experts // NUM_GROUPS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, LANES)
    expert = (lane // EXPERT_LANES) * group_size + lane % EXPERT_LANES
    exists = (lane // EXPERT_LANES < NUM_GROUPS) & (lane % EXPERT_LANES < group_size)
    at = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    valid = (token[:, None] < num_tokens) & exists[None, :]
    x = tl.load(logits + at, mask=valid, other=0.0).to(tl.float32)
    score = _scores(x, exists[None, :], SOFTMAX)
    choice = score
    if bias is not None:
        choice += tl.load(bias + expert, mask=exists, other=0.0)[None, :].to(tl.float32)
    # A score that is no number is the largest, as in torch: the choice stays one of topk experts.
    choice = tl.where(choice >= float("-inf"), choice, float("inf"))
    choice = tl.where(exists[None, :], choice, float("-inf"))
    if GROUP_TOPK < NUM_GROUPS:
        member = tl.arange(0, EXPERT_LANES)[None, None, :]
        group = tl.arange(0, GROUP_LANES)[None, :]
        grouped = tl.reshape(choice, (TOKENS, GROUP_LANES, EXPERT_LANES))
        left = grouped
        total = tl.zeros((TOKENS, GROUP_LANES), tl.float32)
        for _ in tl.static_range(TOPK // GROUP_TOPK):
            total += tl.max(left, axis=2)
            left = tl.where(member == tl.argmax(left, axis=2)[:, :, None], float("-inf"), left)
        kept = tl.zeros((TOKENS, GROUP_LANES), tl.int32)
        for _ in tl.static_range(GROUP_TOPK):
            best = group == tl.argmax(total, axis=1)[:, None]
            kept = tl.where(best, 1, kept)
            total = tl.where(best, float("-inf"), total)
        grouped = tl.where(kept[:, :, None] == 1, grouped, float("-inf"))
        choice = tl.reshape(grouped, (TOKENS, LANES))
    selected = tl.zeros((TOKENS, LANES), tl.int32)
    for _ in tl.static_range(TOPK):
        best = lane[None, :] == tl.argmax(choice, axis=1)[:, None]
        selected = tl.where(best, 1, selected)
        choice = tl.where(best, float("-inf"), choice)
    weight = tl.where(selected == 1, score, 0.0)
    if TOPK > 1:
        total = tl.sum(weight, axis=1) + SUM_FLOOR
        weight = tl.div_rn(weight, tl.broadcast_to(total[:, None], weight.shape))
    tl.store(weights + at, scaling_factor * weight, mask=valid)
    tl.store(chosen + at, selected == 1, mask=valid)


@triton.jit
def _routing_gradient_kernel(
    logits,
    chosen,
    grad,
    logits_grad,
    num_tokens,
    num_experts,
    scaling_factor,
    TOPK: tl.constexpr,
    LANES: tl.constexpr,
    TOKENS: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """Leave the gradient of the logits of some tokens."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, LANES)
    at = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    valid = (token[:, None] < num_tokens) & (expert[None, :] < num_experts)
    x = tl.load(logits + at, mask=valid, other=0.0).to(tl.float32)
    selected = tl.load(chosen + at, mask=valid, other=0).to(tl.int32) == 1
    g = scaling_factor * tl.load(grad + at, mask=valid & selected, other=0.0)
    score = _scores(x, expert[None, :] < num_experts, SOFTMAX)
    if TOPK > 1:
        picked = tl.where(selected, score, 0.0)
        total = tl.broadcast_to((tl.sum(picked, axis=1) + SUM_FLOOR)[:, None], score.shape)
        mean = tl.sum(g * tl.div_rn(picked, total), axis=1)
        g = tl.where(selected, tl.div_rn(g - mean[:, None], total), 0.0)
    if SOFTMAX:
        g -= tl.sum(g * score, axis=1)[:, None]
    else:
        g *= 1.0 - score
    g *= score
    tl.store(logits_grad + at, g.to(logits_grad.dtype.element_ty), mask=valid)


def make_routing(logits: Tensor, bias: Tensor | None, choice: Choice) -> tuple[Tensor, Tensor]:
    """Return (weights fp32, routing map bool), both [t, e], of logits [t, e].

    Args:
        logits: dense.
        bias: [e] fp32 or None.
        choice: the rule.
    """
    num_tokens, experts = logits.shape
    lanes = choice.lanes(experts)
    tokens = max(1, LANES // lanes)
    constants: dict[str, Any] = {
        "NUM_GROUPS": choice.num_groups,
        "GROUP_TOPK": choice.group_topk,
        "TOPK": choice.topk,
        "GROUP_LANES": choice.group_lanes,
        "EXPERT_LANES": lanes // choice.group_lanes,
        "TOKENS": tokens,
        "SOFTMAX": choice.softmax,
    }
    weights = logits.new_empty(logits.shape, dtype=torch.float32)
    chosen = logits.new_empty(logits.shape, dtype=torch.bool)
    _routing_kernel[(-(-num_tokens // tokens),)](
        logits,
        bias,
        weights,
        chosen,
        num_tokens,
        experts,
        choice.scaling_factor,
        **constants,
    )
    return weights, chosen


def make_routing_gradient(logits: Tensor, chosen: Tensor, grad: Tensor, choice: Choice) -> Tensor:
    """Return the gradient [t, e] of the logits, in their dtype, of that of the weights."""
    num_tokens, experts = logits.shape
    lanes = _power_of_two(experts)
    tokens = max(1, LANES // lanes)
    constants: dict[str, Any] = {
        "TOPK": choice.topk,
        "LANES": lanes,
        "TOKENS": tokens,
        "SOFTMAX": choice.softmax,
    }
    logits_grad = torch.empty_like(logits)
    _routing_gradient_kernel[(-(-num_tokens // tokens),)](
        logits,
        chosen,
        grad,
        logits_grad,
        num_tokens,
        experts,
        choice.scaling_factor,
        **constants,
    )
    return logits_grad
