"""Cross-entropy of hidden states that never has the logits of all tokens.

The forward goes through chunks of tokens and keeps one log-sum-exp per token. The backward computes
logits again, tile by tile, turns each tile into the gradient in place, and multiplies it at once.

Unusual: the gradient of the weight is added to megatron's fp32 `main_grad` at once, as megatron's
fused weight gradients do (docs/decisions/0017-cross-entropy.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ring_train.ops.cross_entropy import (
    add_product_,
    check_labels,
    gradient_tile,
    joined_statistics,
    logit_statistics,
    logits_to_gradient_,
    losses_of,
    product,
)


class Chunks(NamedTuple):
    """How the logits are computed."""

    group: ProcessGroup
    """Tensor-parallel ranks, each with a run of v/tp ids, in the order of ranks."""
    num_tokens: int
    """Tokens whose logits exist at a time, or as many logits of other tiles."""
    backend: str = "auto"
    """Of what is computed of a tile; see `ring_train.ops`."""


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunks: Chunks) -> Tensor:
    """Return -log p(label) [t], fp32 or fp64, without logits larger than a chunk.

    Collective over the group: one gather of three numbers a token. The gradient of `hidden` is this
    rank's part of a sum over the group; that of `weight` goes to its `main_grad` if it has one.

    Args:
        hidden: [t, h], the same on every rank of the group.
        weight: [v/tp, h] of the dtype of `hidden`.
        labels: [t] int64, of the whole vocabulary.
        chunks: sizes and group.

    Raises:
        ValueError: shapes or dtypes do not fit, or a label is outside the vocabulary.
    """
    if hidden.ndim != 2 or hidden.shape[1:] != weight.shape[1:] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden={tuple(hidden.shape)} {hidden.dtype} does not fit weight="
            f"{tuple(weight.shape)} {weight.dtype}; give [t, h] and [v, h] of one dtype"
        )
    if labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"labels={tuple(labels.shape)} does not match hidden={tuple(hidden.shape)}; give one "
            "label per token"
        )
    check_labels(labels, weight.shape[0] * chunks.group.size())
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, chunks)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunks: Chunks) -> Tensor:
        group = chunks.group
        labels = labels - group.rank() * weight.shape[0]
        own = torch.cat(
            [
                logit_statistics(torch.mm(rows, weight.t()), ids, backend=chunks.backend)
                for rows, ids in zip(
                    hidden.split(chunks.num_tokens), labels.split(chunks.num_tokens), strict=True
                )
            ],
            dim=1,
        )  # [3, t]
        losses, log_sum_exp = losses_of(joined_statistics(_gathered(own, group)))
        ctx.save_for_backward(hidden, weight, labels, log_sum_exp)
        ctx.chunks = chunks
        # What hooks of saved tensors return is not the parameter, which knows its `main_grad`.
        ctx.parameter = weight
        return losses

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override] -- once_differentiable hides the name of ctx
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_sum_exp = ctx.saved_tensors
        hidden_trained, weight_trained = ctx.needs_input_grad[:2]
        accumulated = _weight_gradient(ctx.parameter) if weight_trained else None
        hidden_grad = torch.empty_like(hidden) if hidden_trained else None
        (num_tokens, _), num_ids = hidden.shape, weight.shape[0]
        tile = gradient_tile(num_tokens, num_ids, ctx.chunks.num_tokens, weight_trained)
        for start in range(0, num_tokens, tile.tokens):
            rows = slice(start, start + tile.tokens)
            # Sums over tiles of ids are fp32; one tile is its own sum, and rounded once, too.
            wide = hidden.dtype if tile.ids == num_ids else log_sum_exp.dtype
            of_rows: Tensor | None = None
            for first in range(0, num_ids, tile.ids):
                ids = slice(first, first + tile.ids)
                logits = torch.mm(hidden[rows], weight[ids].t())  # [rows, ids]
                logits_to_gradient_(
                    logits,
                    labels[rows] - first,
                    log_sum_exp[rows],
                    grad[rows],
                    backend=ctx.chunks.backend,
                )
                if accumulated is not None:
                    add_product_(accumulated[ids], logits.t(), hidden[rows])
                if of_rows is not None:
                    add_product_(of_rows, logits, weight[ids])
                elif hidden_grad is not None:
                    of_rows = product(logits, weight[ids], wide)
                del logits  # before the next tile
            if hidden_grad is not None and of_rows is not None:
                hidden_grad[rows] = of_rows
        return hidden_grad, _handed_on(ctx.parameter, accumulated), None, None


def _gathered(statistics: Tensor, group: ProcessGroup) -> Tensor:
    """Return [tp, 3, t] of statistics [3, t]."""
    if group.size() == 1:
        return statistics[None]
    parts = statistics.new_empty(group.size(), *statistics.shape)
    torch.distributed.all_gather_into_tensor(parts.flatten(0, 1), statistics, group=group)
    return parts


def _weight_gradient(parameter: Any) -> Tensor:
    """Return what the gradient of the weight is added to: `main_grad`, else zeros, fp32 (fp64)."""
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is not None:
        return main_grad
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=dtype)


def _handed_on(parameter: Any, accumulated: Tensor | None) -> Tensor | None:
    """Return what autograd gets of the weight's gradient.

    Where it lies in `main_grad` already, megatron's hook is told so, and only needs some tensor on
    the device to run on the thread of the backward: zeros that take no memory until they are added.

    Source: megatron-core 0.19.2 `tensor_parallel/layers.py`,
    LinearWithGradAccumulationAndAsyncCommunication; `distributed/distributed_data_parallel.py`,
    _make_backward_post_hook.
    """
    if accumulated is None:
        return None
    if getattr(parameter, "main_grad", None) is None:
        return accumulated.to(parameter.dtype)
    parameter.grad_added_to_main_grad = True
    return parameter.detach().new_zeros(()).expand_as(parameter)
