"""Launches of every kernel that bench/kernels_aot.py compiles, at the sizes of Ring-mini-linear.

Tensors are on the device "meta": they have shapes, and no values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

TOKENS, HIDDEN, HEADS, QUERY_GROUPS, HEAD_DIM, ROTATED = 32768, 2048, 16, 4, 128, 64
EXPERTS, TOP_K, EXPERT_GROUPS, GROUP_TOP_K, EXPERT_DIM = 256, 8, 8, 4, 512
VOCABULARY, LOSS_TOKENS, NORM_GROUPS, EPSILON = 157184, 1024, 4, 1e-6
BF16, FP16, FP32, INT32 = torch.bfloat16, torch.float16, torch.float32, torch.int32

Cases = dict[str, Callable[[], Any]]
"""Name -> function that launches kernels."""


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Return a tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def lightning_cases(capability: int) -> Cases:
    """Return forward and backward of lightning attention."""
    return {
        f"{str(dtype).removeprefix('torch.')}{', documents' * many}{', states' * states}": (
            lambda dtype=dtype, many=many, states=states: lightning(capability, dtype, many, states)
        )
        for dtype in (BF16, FP16)
        for many in (False, True)
        for states in (False, True)
    }


def lightning(capability: int, dtype: torch.dtype, many: bool, states: bool) -> None:
    """Launch both passes; the chunk is what `chunk_size_for` chooses on such a device."""
    from ring_train.ops.lightning import lightning_attention

    q, k, v = (empty(TOKENS, HEADS, HEAD_DIM, dtype=dtype).requires_grad_() for _ in range(3))
    lengths = (TOKENS // 4,) * 4 if many else (TOKENS,)
    initial = None
    if states:
        initial = empty(len(lengths), HEADS, HEAD_DIM, HEAD_DIM, dtype=FP32).requires_grad_()
    output, final = lightning_attention(
        *(q, k, v, empty(HEADS, dtype=FP32)),
        cu_seqlens=empty(len(lengths) + 1, dtype=INT32),
        lengths=lengths,
        initial_state=initial,
        output_final_state=states,
        chunk_size=128 if dtype == BF16 and capability >= 90 else 64,
        backend="triton",
    )
    results = [output] if final is None else [output, final]
    torch.autograd.backward(results, [torch.empty_like(x) for x in results])


def qk_norm_rope_cases(_: int) -> Cases:
    """Return split, QK-norm and partial RoPE of both kinds of layers."""
    return {
        "lightning": lambda: qk_norm_rope(HEADS, 1, silu=True),
        "softmax": lambda: qk_norm_rope(QUERY_GROUPS, HEADS // QUERY_GROUPS, silu=False),
    }


def qk_norm_rope(groups: int, queries: int, *, silu: bool) -> None:
    """Launch both passes for so many groups of queries, a key and a value."""
    from ring_train.ops.kernels.qk_norm_rope import join_gradients, split_heads

    qkv = empty(TOKENS, groups, queries + 2, HEAD_DIM)
    weights = empty(HEAD_DIM), empty(HEAD_DIM)
    cos, sin = (empty(TOKENS, ROTATED, dtype=FP32) for _ in range(2))
    heads = split_heads(qkv, weights, cos, sin, eps=EPSILON, silu=silu)
    join_gradients(qkv, weights, cos, sin, heads, eps=EPSILON, silu=silu)


def norm_cases(_: int) -> Cases:
    """Return RMSNorm of the residual stream, and that of groups with a gate."""
    return {
        "hidden": lambda: norm(HIDDEN, 1, gated=False),
        "gated groups": lambda: norm(HEADS * HEAD_DIM, NORM_GROUPS, gated=True),
    }


def norm(channels: int, num_groups: int, *, gated: bool) -> None:
    """Launch both passes."""
    from ring_train.ops.kernels.norm import normalise, normalise_gradients

    x, weight = empty(TOKENS, channels), empty(channels)
    gate = empty(TOKENS, channels) if gated else None
    output = normalise(x, gate, weight, num_groups=num_groups, eps=EPSILON)
    normalise_gradients(x, gate, weight, output, num_groups=num_groups, eps=EPSILON)


def router_cases(_: int) -> Cases:
    """Return the router: product in fp32, scores and choice in groups."""
    return {"sigmoid, groups": router}


def router() -> None:
    """Launch both passes."""
    from ring_train.ops.kernels import router as kernels

    x, weight = empty(TOKENS, HIDDEN), empty(EXPERTS, HIDDEN, dtype=FP32)
    choice = kernels.Choice(False, TOP_K, EXPERT_GROUPS, GROUP_TOP_K, 2.5)
    logits = kernels.make_logits(x, weight)
    weights, chosen = kernels.make_routing(logits, empty(EXPERTS, dtype=FP32), choice)
    grad = kernels.make_routing_gradient(logits, chosen, weights, choice)
    kernels.make_input_gradient(grad, weight, BF16)
    kernels.make_weight_gradient(grad, x, FP32)


def cross_entropy_cases(_: int) -> Cases:
    """Return the loss of a chunk of tokens."""
    return {"chunk": cross_entropy}


def cross_entropy() -> None:
    """Launch both passes."""
    from ring_train.ops.kernels.cross_entropy import make_statistics, turn_into_gradient_

    logits = empty(LOSS_TOKENS, VOCABULARY)
    labels = empty(LOSS_TOKENS, dtype=torch.int64)
    make_statistics(logits, labels)
    log_sum_exp, grad = (empty(LOSS_TOKENS, dtype=FP32) for _ in range(2))
    turn_into_gradient_(logits, labels, log_sum_exp, grad)


def expert_cases(_: int) -> Cases:
    """Return what surrounds the grouped products of experts."""
    return {"permutation": permutation, "weighted SwiGLU": swiglu}


def permutation() -> None:
    """Launch the gather and the sum, each the gradient of the other."""
    from ring_train.ops.kernels.permutation import gather_rows, sum_rows

    rows = gather_rows(empty(TOKENS, HIDDEN), empty(TOKENS * TOP_K, dtype=INT32), TOP_K)
    sum_rows(rows, empty(TOKENS, TOP_K, dtype=INT32))


def swiglu() -> None:
    """Launch both passes."""
    from ring_train.ops.kernels.swiglu import swiglu, swiglu_gradient

    x, weights = empty(TOKENS * TOP_K, 2 * EXPERT_DIM), empty(TOKENS * TOP_K, dtype=FP32)
    swiglu_gradient(swiglu(x, weights), x, weights)


FAMILIES: dict[str, Callable[[int], Cases]] = {
    "lightning": lightning_cases,
    "qk_norm_rope": qk_norm_rope_cases,
    "norm": norm_cases,
    "router": router_cases,
    "cross_entropy": cross_entropy_cases,
    "experts": expert_cases,
}
"""Family -> function of a compute capability, e.g. 90, that returns its cases."""
