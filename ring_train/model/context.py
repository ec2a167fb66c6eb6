"""Context parallelism of both token mixers: what ranks exchange inside a layer.

Lightning attention exchanges one d x dv state per head and segment, whatever the length of the row:
each rank starts its segments from nothing, and what an earlier segment leaves to a later one is its
state times a constant. Softmax attention gathers keys and values of the row (few heads, with GQA)
and keeps its queries; gradients of keys and values are summed back to the ranks that own them.

Both are exact for documents that are cut anywhere. Sums over ranks are fp32 or above.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ring_train.model.documents import Documents
from ring_train.ops.attention import piece_attention
from ring_train.ops.lightning import lightning_attention, lightning_backend
from ring_train.ops.lightning_state import read_state, run_state, transfer_weights
from ring_train.ops.precision import compute_dtype
from ring_train.plan.context import ContextRow


def context_lightning_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    *,
    documents: Documents,
    group: torch.distributed.ProcessGroup,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the output [t/cp, n/tp, dv] of lightning attention. Collective over `group`.

    Args:
        query: [t/cp, n/tp, d], this rank's segments one after the other; key and value alike.
        key: see query.
        value: see query.
        slopes: [n/tp] decay rates.
        documents: this rank's pieces of the row, with their context.
        group: context-parallel ranks.
        backend: of `lightning_attention`.
    """
    row = documents.context
    assert row is not None
    dtype, scale = compute_dtype(query.dtype), query.shape[2] ** -0.5
    rates = slopes.detach().double()
    has_kernels = lightning_backend(backend, query) != "torch"
    # torch takes what is widened once; kernels take rows as they are.
    k, v = (key, value) if has_kernels else (key.to(dtype), value.to(dtype))
    weights = transfer_weights(rates, row.distances, dtype)
    states = _outgoing_states(k, v, rates, row)
    incoming = _Exchange.apply(states, weights, row, group)  # [own, n/tp, d, dv]
    if has_kernels:
        # Kernels read the states themselves, and round the output once.
        output, _ = lightning_attention(
            *(query, key, value, slopes),
            cu_seqlens=documents.cu_seqlens_q,
            lengths=row.lengths,
            scale=scale,
            initial_state=incoming,
            initial_documents=_first_pieces(row),
            backend=backend,
        )
        return output
    q = query.to(dtype)
    output, _ = lightning_attention(
        *(q, k, v, slopes),
        cu_seqlens=documents.cu_seqlens_q,
        lengths=row.lengths,
        scale=scale,
        backend="torch",
    )
    parts = list(output.split(row.lengths))
    queries, number = q.split(row.lengths), 0
    for state, pieces in zip(incoming, row.pieces, strict=True):
        # Also where a document begins and the state is zero: each rank must reach the backward of
        # the exchange, or the others wait for it.
        parts[number] = parts[number] + read_state(queries[number] * scale, state, rates)
        number += len(pieces)
    return torch.cat(parts).to(query.dtype)


def _outgoing_states(
    key: torch.Tensor, value: torch.Tensor, rates: torch.Tensor, row: ContextRow
) -> torch.Tensor:
    """Return [own, n/tp, d, dv]: what the last document of each segment adds to a state."""
    sizes = [sum(piece.length for piece in pieces) for pieces in row.pieces]
    lasts = [pieces[-1].length for pieces in row.pieces]
    runs = zip(key.split(sizes), value.split(sizes), lasts, strict=True)
    return torch.stack([run_state(k[-n:], v[-n:], rates) for k, v, n in runs])


def _first_pieces(row: ContextRow) -> tuple[int, ...]:
    """Return the number of the first piece of each segment."""
    return (*accumulate((len(pieces) for pieces in row.pieces[:-1]), initial=0),)


def context_softmax_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    row: ContextRow,
    group: torch.distributed.ProcessGroup,
    scale: float,
) -> torch.Tensor:
    """Return causal attention [t/cp, n/tp, d] within documents. Collective over `group`.

    Args:
        query: [t/cp, n/tp, d], this rank's segments one after the other.
        key: [t/cp, g/tp, d]
        value: [t/cp, g/tp, d]
        row: the row as this rank sees it.
        group: context-parallel ranks.
        scale: of the scores.
    """
    both = torch.stack([key, value])  # [2, t/cp, g/tp, d]
    keys, values = _GatherRow.apply(both, row, group)  # [2, t, g/tp, d]
    pieces = [(p.start, p.stop, p.document_start) for pieces in row.pieces for p in pieces]
    return piece_attention(query, keys, values, pieces=pieces, scale=scale)


class _Exchange(torch.autograd.Function):
    """States that segments leave behind -> states in which this rank's segments begin."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        weights: torch.Tensor,
        row: ContextRow,
        group: torch.distributed.ProcessGroup,
    ) -> torch.Tensor:
        ctx.save_for_backward(weights)
        ctx.row, ctx.group = row, group
        left = _gather_segments(states, row, group)  # [segments, n, d, dv]
        return torch.einsum("nij,inde->jnde", weights[:, :, list(row.own)], left)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override] -- once_differentiable hides the name of ctx
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        read = _gather_segments(grad, ctx.row, ctx.group)  # [segments, n, d, dv]
        own = torch.einsum("nij,jnde->inde", weights[:, list(ctx.row.own), :], read)
        return own, None, None, None


class _GatherRow(torch.autograd.Function):
    """[2, t/cp, ...] of this rank -> [2, t, ...] in the order of the row."""

    @staticmethod
    def forward(
        ctx: Any, own: torch.Tensor, row: ContextRow, group: torch.distributed.ProcessGroup
    ) -> torch.Tensor:
        ctx.row, ctx.group = row, group
        segments = torch.stack(own.chunk(len(row.own), dim=1))  # [own, 2, t/2cp, ...]
        return torch.cat(_gather_segments(segments, row, group).unbind(), dim=1)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override] -- once_differentiable hides the name of ctx
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        row: ContextRow = ctx.row
        segments = torch.stack(grad.chunk(len(row.segments), dim=1))
        own = _sum_segments(segments, row, ctx.group)
        return torch.cat(own.unbind(), dim=1), None, None


def _gather_segments(
    own: torch.Tensor, row: ContextRow, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Return [segments, ...] in the order of the row from this rank's [own, ...]."""
    gathered = own.new_empty(len(row.segments), *own.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, own.contiguous(), group=group)
    order = torch.tensor(row.by_rank).argsort().tolist()
    return gathered[order]


def _sum_segments(
    segments: torch.Tensor, row: ContextRow, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Return this rank's [own, ...] of the sum over ranks of [segments, ...]."""
    by_rank = segments[list(row.by_rank)].to(compute_dtype(segments.dtype))
    own = by_rank.new_empty(len(row.own), *by_rank.shape[1:])
    torch.distributed.reduce_scatter_tensor(own, by_rank, group=group)
    return own.to(segments.dtype)
