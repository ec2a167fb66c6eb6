"""Pass 2 of lightning attention in Triton, backward; see `lightning_states`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ring_train.ops.kernels.launching import dot_precision, padded, tuned
from ring_train.ops.kernels.lightning_states import Row, States, make_states, strides
from ring_train.ops.kernels.lightning_tiles import (
    boundary_weight,
    carried_weight,
    decay,
    dot_state,
    load_columns,
    load_rows,
    load_tile,
    pair_weight,
    read_states,
)


@tuned(("D", "DV", "num_heads"), (4, 1), (4, 2), (8, 1), (8, 2), first=(4, 1))
@triton.jit
def _gradient_kernel(
    q,
    k,
    v,
    grad,
    slopes,
    documents,
    boundaries,
    initial,
    final_grad,
    local,
    carried,
    grad_local,
    grad_carried,
    q_grad,
    k_grad,
    v_grad,
    num_tokens,
    num_heads,
    chunks_per_segment,
    q_stride_t,
    q_stride_n,
    k_stride_t,
    k_stride_n,
    v_stride_t,
    v_stride_n,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    MANY: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradients of q, k and v of one head for some rows of a chunk."""
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1) % (CHUNK // ROWS)
    chunk = tl.program_id(1) // (CHUNK // ROWS)
    dim, column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, num_tokens)
    rows = start + block * ROWS + tl.arange(0, ROWS)
    slope = tl.load(slopes + head)
    entry = tl.program_id(1) * 0
    leave = tl.program_id(1) * 0
    if MANY:
        entry, leave = tl.load(documents + start), tl.load(documents + stop - 1)
    rows64 = rows.to(tl.int64)[:, None]
    inside = rows[:, None] < num_tokens
    left = 0.0
    if carried is not None:
        left = carried_weight(
            documents, slope, chunk, num_tokens, chunks_per_segment, CHUNK, False, MANY
        )

    # The gradient of q, from earlier keys and values and the state before the chunk.
    out_grad = load_rows(grad, rows, head, num_heads * DV, DV, column, num_tokens, DV)
    found = read_states(
        out_grad,
        local,
        carried,
        left,
        chunk,
        chunks_per_segment,
        head,
        num_heads,
        dim[None, :],
        column[:, None],
        D,
        DV,
        PRECISION,
    )
    read = boundary_weight(slope, rows - start + 1, documents, rows, start, num_tokens, MANY)
    found = tl.where(read[:, None] > 0, scale * read[:, None] * found, 0.0)
    for other in range(block + 1):
        seen = start + other * ROWS + tl.arange(0, ROWS)
        values = load_columns(v, seen, head, v_stride_t, v_stride_n, column, num_tokens, DV)
        keys = load_rows(k, seen, head, k_stride_t, k_stride_n, dim, num_tokens, D)
        weight = pair_weight(slope, documents, rows, seen, num_tokens, MANY)
        scores = tl.dot(out_grad, values, input_precision=PRECISION)
        scores = tl.where(weight > 0, scores * (weight * scale), 0.0)
        found += tl.dot(scores.to(keys.dtype), keys, input_precision=PRECISION)
    if HAS_INITIAL:
        for begun in range(entry, leave + 1):
            low, high = tl.load(boundaries + begun), tl.load(boundaries + begun + 1)
            if low >= start:
                before = load_tile(
                    initial, begun, head, num_heads, dim[None, :], column[:, None], D, DV
                )
                weight = decay(slope, rows - low + 1)
                own = (rows >= low) & (rows < high)
                given = scale * weight[:, None] * dot_state(out_grad, before, PRECISION)
                found += tl.where(own[:, None], given, 0.0)
    at = (rows64 * num_heads + head) * D + dim[None, :]
    tl.store(q_grad + at, found.to(q_grad.dtype.element_ty), mask=inside & (dim[None, :] < D))

    # The gradients of k and v, from later queries and gradients and the state after the chunk.
    if grad_carried is not None:
        left = carried_weight(
            documents, slope, chunk, num_tokens, chunks_per_segment, CHUNK, True, MANY
        )
    write = boundary_weight(slope, stop - rows, documents, rows, stop - 1, num_tokens, MANY)
    write = tl.where(rows < num_tokens, write, 0.0)
    keys = load_rows(k, rows, head, k_stride_t, k_stride_n, dim, num_tokens, D)
    values = load_rows(v, rows, head, v_stride_t, v_stride_n, column, num_tokens, DV)
    k_found = read_states(
        values,
        grad_local,
        grad_carried,
        left,
        chunk,
        chunks_per_segment,
        head,
        num_heads,
        dim[None, :],
        column[:, None],
        D,
        DV,
        PRECISION,
    )
    k_found = tl.where(write[:, None] > 0, write[:, None] * k_found, 0.0)
    v_found = read_states(
        keys,
        grad_local,
        grad_carried,
        left,
        chunk,
        chunks_per_segment,
        head,
        num_heads,
        dim[:, None],
        column[None, :],
        D,
        DV,
        PRECISION,
    )
    v_found = tl.where(write[:, None] > 0, write[:, None] * v_found, 0.0)
    for other in range(block, CHUNK // ROWS):
        later = start + other * ROWS + tl.arange(0, ROWS)
        query = load_rows(q, later, head, q_stride_t, q_stride_n, dim, num_tokens, D)
        later_grad = load_rows(grad, later, head, num_heads * DV, DV, column, num_tokens, DV)
        weight = scale * tl.trans(pair_weight(slope, documents, later, rows, num_tokens, MANY))
        scores = tl.dot(values, tl.trans(later_grad), input_precision=PRECISION)
        scores = tl.where(weight > 0, scores * weight, 0.0)  # [key, query]
        k_found += tl.dot(scores.to(query.dtype), query, input_precision=PRECISION)
        scores = tl.dot(keys, tl.trans(query), input_precision=PRECISION)
        scores = tl.where(weight > 0, scores * weight, 0.0)
        v_found += tl.dot(scores.to(query.dtype), later_grad, input_precision=PRECISION)
    if HAS_FINAL:
        for ended in range(entry, leave + 1):
            low, high = tl.load(boundaries + ended), tl.load(boundaries + ended + 1)
            if high <= stop:
                weight = decay(slope, high - 1 - rows)[:, None]
                own = ((rows >= low) & (rows < high))[:, None]
                after = load_tile(
                    final_grad, ended, head, num_heads, dim[:, None], column[None, :], D, DV
                )
                given = dot_state(values, tl.trans(after), PRECISION)
                k_found += tl.where(own, weight * given, 0.0)
                v_found += tl.where(own, weight * dot_state(keys, after, PRECISION), 0.0)
    tl.store(k_grad + at, k_found.to(k_grad.dtype.element_ty), mask=inside & (dim[None, :] < D))
    at = (rows64 * num_heads + head) * DV + column[None, :]
    tl.store(v_grad + at, v_found.to(v_grad.dtype.element_ty), mask=inside & (column[None, :] < DV))


def make_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grad: Tensor,
    row: Row,
    states: States,
    *,
    final_grad: Tensor | None,
    with_initial_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and of the initial states (fp32, or None).

    Args:
        inputs: queries, keys, values and initial states (or None) of the forward pass.
        grad: [t, n, dv] of the output, contiguous, in the dtype of `q`.
        row: see `make_states`.
        states: of the forward pass.
        final_grad: of the final states, fp32 and contiguous.
        with_initial_grad: whether that of the initial states is wanted.
    """
    q, k, v, initial = inputs
    num_tokens, heads, d = q.shape
    dv = v.shape[2]
    after, first = make_states(
        q, grad, row, initial=final_grad, with_final=with_initial_grad, reverse=True
    )
    q_grad, k_grad = q.new_empty(2, num_tokens, heads, d).unbind()
    v_grad = v.new_empty(num_tokens, heads, dv)
    _gradient_kernel[(heads, row.num_blocks(num_tokens))](
        *(q, k, v, grad, *row.tensors, initial, final_grad),
        *(states.local, states.carried, after.local, after.carried, q_grad, k_grad, v_grad),
        *(num_tokens, heads, states.chunks_per_segment, *strides(q, k, v), row.scale),
        D=d,
        DV=dv,
        BLOCK_D=padded(d),
        BLOCK_V=padded(dv),
        CHUNK=row.chunk_size,
        ROWS=row.block_rows,
        MANY=row.documents is not None,
        HAS_INITIAL=initial is not None,
        HAS_FINAL=final_grad is not None,
        PRECISION=dot_precision(q.dtype),
    )
    if first is not None:
        first = first * torch.exp(-row.slopes)[:, None, None]
    return q_grad, k_grad, v_grad, first
