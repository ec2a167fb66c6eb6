"""Tokens to the rows of their experts and back, without experts on other ranks.

An expert multiplies the rows of its tokens, which lie together: the rows of the first expert first,
within one expert by token. Each token has as many rows as experts were chosen for it. Both ways,
and in both gradients, every element is read where it is needed, so nothing is added up by atomics
and the host never waits for the number of rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ring_train.ops.backends import resolve_backend
from ring_train.ops.precision import compute_dtype


@dataclass(frozen=True)
class Permutation:
    """Which row belongs to which token; m = t * k rows, the last ones without a token."""

    slot: Int[Tensor, " m"]
    """int32; k times the token of each row, plus which of its experts; -1 without a token."""
    rows: Int[Tensor, "t k"]
    """int32; the rows of each token, by expert; -1 where it has fewer than k experts."""
    experts: Int[Tensor, "t k"]
    """int64; the experts of each token, ascending; 0 where it has fewer than k."""
    counts: Int[Tensor, " e"]
    """int64; rows of each expert."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields, for autograd to keep."""
        return self.slot, self.rows, self.experts, self.counts


@torch.no_grad()
def make_permutation(routing_map: Bool[Tensor, "t e"], topk: int) -> Permutation:
    """Return the permutation of a routing map; the host waits for nothing.

    Args:
        routing_map: True where an expert was chosen for a token.
        topk: experts of a token, at most.

    Raises:
        ValueError: a token has more; on a GPU that ends the process at its next check.
    """
    if routing_map.dtype != torch.bool or not 1 <= topk <= routing_map.shape[1]:
        raise ValueError(
            f"topk={topk}, routing_map {tuple(routing_map.shape)} of {routing_map.dtype}: give a "
            "bool per token and expert, and topk from 1 to the experts"
        )
    num_tokens, experts = routing_map.shape
    chosen = routing_map.mT.contiguous()  # [e, t]
    row = chosen.flatten().cumsum(0, dtype=torch.int32).view_as(chosen) - 1
    number = chosen.cumsum(0, dtype=torch.int32)  # [e, t], chosen experts up to this one
    _check_number(number[-1], topk)
    # A column more takes what was not chosen.
    column = torch.where(chosen, number - 1, topk).mT.long()  # [t, e]
    rows = row.new_full((num_tokens, topk + 1), -1).scatter_(1, column, row.mT)
    expert = torch.arange(experts, device=chosen.device).expand_as(column)
    found = expert.new_zeros(num_tokens, topk + 1).scatter_(1, column, expert)
    rows = rows[:, :topk].contiguous()
    size = rows.numel()
    place = torch.where(rows < 0, size, rows).flatten().long()
    slots = torch.arange(size, device=chosen.device, dtype=torch.int32)
    slot = rows.new_full((size + 1,), -1).scatter_(0, place, slots)[:size]
    return Permutation(slot, rows, found[:, :topk].contiguous(), chosen.sum(1))


def _check_number(chosen: Int[Tensor, " t"], topk: int) -> None:
    message = f"a token has more than topk={topk} experts; give the topk of its router"
    if chosen.is_cuda:
        torch._assert_async((chosen <= topk).all(), message)
    elif not chosen.is_meta and bool((chosen > topk).any()):
        raise ValueError(message)


def permute_tokens(
    x: Float[Tensor, "t h"], permutation: Permutation, *, backend: str = "auto"
) -> Float[Tensor, "m h"]:
    """Return the rows of the experts, zeros where there is no token. Differentiable in `x`.

    Args:
        x: a row per token.
        permutation: of these tokens.
        backend: "auto", "torch" or "triton".
    """
    _check_rows("x", x, permutation.rows.shape[0])
    return _Permute.apply(x, permutation, resolve_backend(backend, x))


def unpermute_tokens(
    y: Float[Tensor, "m h"], permutation: Permutation, *, backend: str = "auto"
) -> Float[Tensor, "t h"]:
    """Return the sum of the rows of each token, added by ascending expert in fp32 (or fp64).

    Rows without a token are not read. Differentiable in `y`.

    Args:
        y: a row per token and expert.
        permutation: of these rows.
        backend: "auto", "torch" or "triton".
    """
    _check_rows("y", y, permutation.slot.shape[0])
    return _Unpermute.apply(y, permutation, resolve_backend(backend, y))


def permute_weights(weights: Float[Tensor, "t e"], permutation: Permutation) -> Float[Tensor, " m"]:
    """Return the weight of each row, 0 without a token. Differentiable in `weights`."""
    _check_rows("weights", weights, permutation.rows.shape[0])
    return _PermuteWeights.apply(weights, permutation)


def _check_rows(name: str, x: Tensor, rows: int) -> None:
    if x.shape[0] != rows:
        raise ValueError(
            f"{name} has {x.shape[0]} rows, but the permutation is of {rows}; permute what it was "
            "made for"
        )


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, permutation: Permutation, backend: str) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(*permutation.tensors)
        return _gathered(x, permutation, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _summed(grads[0], Permutation(*ctx.saved_tensors), ctx.backend), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, permutation: Permutation, backend: str) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(*permutation.tensors)
        return _summed(y, permutation, backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grads[0], Permutation(*ctx.saved_tensors), ctx.backend), None, None


class _PermuteWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, permutation: Permutation) -> Tensor:
        ctx.shape = weights.shape
        ctx.save_for_backward(*permutation.tensors)
        slot = permutation.slot
        chosen = weights.gather(1, permutation.experts)  # [t, k]
        return chosen.flatten()[slot.clamp(min=0)].masked_fill_(slot < 0, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        _, rows, experts, _ = ctx.saved_tensors
        chosen = grads[0][rows.clamp(min=0)].masked_fill_(rows < 0, 0.0)  # [t, k]
        # Added, because places without an expert name expert 0.
        return chosen.new_zeros(ctx.shape).scatter_add_(1, experts, chosen), None


def _gathered(x: Tensor, permutation: Permutation, backend: str) -> Tensor:
    """Return [m, h]: the row of x [t, h] of the token of each row."""
    if backend == "triton":
        from ring_train.ops.kernels.permutation import gather_rows

        return gather_rows(x.contiguous(), permutation.slot, permutation.rows.shape[1])
    return gather_rows_reference(x, permutation)


def _summed(y: Tensor, permutation: Permutation, backend: str) -> Tensor:
    """Return [t, h]: the sum of the rows of y [m, h] of each token."""
    if backend == "triton":
        from ring_train.ops.kernels.permutation import sum_rows

        return sum_rows(y.contiguous(), permutation.rows)
    return sum_rows_reference(y, permutation)


def gather_rows_reference(
    x: Float[Tensor, "t h"], permutation: Permutation
) -> Float[Tensor, "m h"]:
    """Return `permute_tokens` in torch."""
    slot = permutation.slot
    token = slot.clamp(min=0) // permutation.rows.shape[1]
    return x.index_select(0, token).masked_fill_((slot < 0)[:, None], 0.0)


def sum_rows_reference(y: Float[Tensor, "m h"], permutation: Permutation) -> Float[Tensor, "t h"]:
    """Return `unpermute_tokens` in torch."""
    rows = permutation.rows
    total = y.new_zeros(rows.shape[0], y.shape[1], dtype=compute_dtype(y.dtype))
    for column in rows.unbind(1):
        part = y.index_select(0, column.clamp(min=0))
        total += part.masked_fill_((column < 0)[:, None], 0.0)
    return total.to(y.dtype)
