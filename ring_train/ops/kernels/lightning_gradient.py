"""Pass 2 of lightning attention in Triton, backward; see `lightning_states`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ring_train.ops.kernels.launching import dot_precision, padded, tuned
from ring_train.ops.kernels.lightning_states import Row, States, make_states
from ring_train.ops.kernels.lightning_tiles import (
    decay,
    dot_state,
    load_columns,
    load_rows,
    load_tile,
    state_before,
)


@tuned(("D", "DV", "num_heads"), (8, 2), (4, 1), first=(8, 1))
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
    MANY: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradients of q, k and v of one head in one chunk; `grad` is contiguous."""
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim, column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    start = chunk * CHUNK
    stop = tl.minimum(start + CHUNK, num_tokens)
    place = tl.arange(0, CHUNK)
    rows = start + place
    slope = tl.load(slopes + head)
    weight = decay(slope, place[:, None] - place[None, :])  # [query, key]
    read = decay(slope, place + 1)
    write = decay(slope, stop - rows)
    entry = tl.program_id(1) * 0
    leave = tl.program_id(1) * 0
    if MANY:
        document = tl.load(documents + rows, mask=rows < num_tokens, other=-1)
        entry, leave = tl.load(documents + start), tl.load(documents + stop - 1)
        weight = tl.where(document[:, None] == document[None, :], weight, 0.0)
        read = tl.where(document == entry, read, 0.0)
        write = tl.where(document == leave, write, 0.0)
    rows64 = rows.to(tl.int64)[:, None]
    inside = rows[:, None] < num_tokens

    # Scores of gradients and values, and the gradient of q.
    out_grad = load_rows(grad, rows, head, num_heads * DV, DV, column, num_tokens, DV)
    values = load_columns(v, rows, head, v_stride_t, v_stride_n, column, num_tokens, DV)
    keys = load_rows(k, rows, head, k_stride_t, k_stride_n, dim, num_tokens, D)
    scores = tl.dot(out_grad, values, input_precision=PRECISION) * scale
    scores = tl.where(weight > 0, scores * weight, 0.0).to(keys.dtype)  # [query, key]
    state = state_before(
        local,
        carried,
        documents,
        slope,
        chunk,
        head,
        num_heads,
        num_tokens,
        chunks_per_segment,
        dim[None, :],
        column[:, None],
        D,
        DV,
        CHUNK,
        False,
        MANY,
    )  # [dv, d]
    found = tl.where(
        read[:, None] > 0, scale * read[:, None] * dot_state(out_grad, state, PRECISION), 0.0
    )
    found += tl.dot(scores, keys, input_precision=PRECISION)
    if HAS_INITIAL:
        for begun in range(entry, leave + 1):
            low, high = tl.load(boundaries + begun), tl.load(boundaries + begun + 1)
            if low >= start:
                before = load_tile(
                    initial, begun, head, num_heads, dim[None, :], column[:, None], D, DV
                )
                seen = decay(slope, rows - low + 1)[:, None] * dot_state(
                    out_grad, before, PRECISION
                )
                own = (rows >= low) & (rows < high)
                found += tl.where(own[:, None], scale * seen, 0.0)
    at = (rows64 * num_heads + head) * D + dim[None, :]
    tl.store(q_grad + at, found.to(q_grad.dtype.element_ty), mask=inside & (dim[None, :] < D))

    # The gradient of k.
    queries = load_rows(q, rows, head, q_stride_t, q_stride_n, dim, num_tokens, D)
    state = state_before(
        grad_local,
        grad_carried,
        documents,
        slope,
        chunk,
        head,
        num_heads,
        num_tokens,
        chunks_per_segment,
        dim[None, :],
        column[:, None],
        D,
        DV,
        CHUNK,
        True,
        MANY,
    )  # [dv, d]
    value_rows = load_rows(v, rows, head, v_stride_t, v_stride_n, column, num_tokens, DV)
    found = tl.where(
        write[:, None] > 0, write[:, None] * dot_state(value_rows, state, PRECISION), 0.0
    )
    found += tl.dot(tl.trans(scores), queries, input_precision=PRECISION)
    if HAS_FINAL:
        for ended in range(entry, leave + 1):
            low, high = tl.load(boundaries + ended), tl.load(boundaries + ended + 1)
            if high <= stop:
                after = load_tile(
                    final_grad, ended, head, num_heads, dim[None, :], column[:, None], D, DV
                )
                seen = decay(slope, high - 1 - rows)[:, None] * dot_state(
                    value_rows, after, PRECISION
                )
                own = (rows >= low) & (rows < high)
                found += tl.where(own[:, None], seen, 0.0)
    tl.store(k_grad + at, found.to(k_grad.dtype.element_ty), mask=inside & (dim[None, :] < D))

    # The gradient of v.
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    scores = tl.where(weight > 0, scores * weight, 0.0).to(keys.dtype)  # [query, key]
    state = state_before(
        grad_local,
        grad_carried,
        documents,
        slope,
        chunk,
        head,
        num_heads,
        num_tokens,
        chunks_per_segment,
        dim[:, None],
        column[None, :],
        D,
        DV,
        CHUNK,
        True,
        MANY,
    )  # [d, dv]
    found = tl.where(write[:, None] > 0, write[:, None] * dot_state(keys, state, PRECISION), 0.0)
    found += tl.dot(tl.trans(scores), out_grad, input_precision=PRECISION)
    if HAS_FINAL:
        for ended in range(entry, leave + 1):
            low, high = tl.load(boundaries + ended), tl.load(boundaries + ended + 1)
            if high <= stop:
                after = load_tile(
                    final_grad, ended, head, num_heads, dim[:, None], column[None, :], D, DV
                )
                seen = decay(slope, high - 1 - rows)[:, None] * dot_state(keys, after, PRECISION)
                own = (rows >= low) & (rows < high)
                found += tl.where(own[:, None], seen, 0.0)
    at = (rows64 * num_heads + head) * DV + column[None, :]
    tl.store(v_grad + at, found.to(v_grad.dtype.element_ty), mask=inside & (column[None, :] < DV))


def make_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    row: Row,
    states: States,
    *,
    initial: Tensor | None,
    final_grad: Tensor | None,
    with_initial_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of q, k, v and of the initial states (fp32, or None).

    Args:
        q: queries, see `make_states`.
        k: keys.
        v: values.
        grad: [t, n, dv] of the output, contiguous, in the dtype of `q`.
        row: see `make_states`.
        states: of the forward pass.
        initial: of the forward pass.
        final_grad: of the final states, fp32 and contiguous.
        with_initial_grad: whether that of the initial states is wanted.
    """
    num_tokens, heads, d = q.shape
    dv = v.shape[2]
    after, first = make_states(
        q, grad, row, initial=final_grad, with_final=with_initial_grad, reverse=True
    )
    q_grad, k_grad = q.new_empty(2, num_tokens, heads, d).unbind()
    v_grad = v.new_empty(num_tokens, heads, dv)
    _gradient_kernel[(heads, -(-num_tokens // row.chunk_size))](
        q,
        k,
        v,
        grad,
        row.slopes,
        row.documents,
        row.boundaries,
        initial,
        final_grad,
        states.local,
        states.carried,
        after.local,
        after.carried,
        q_grad,
        k_grad,
        v_grad,
        num_tokens,
        heads,
        states.chunks_per_segment,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        row.scale,
        D=d,
        DV=dv,
        BLOCK_D=padded(d),
        BLOCK_V=padded(dv),
        CHUNK=row.chunk_size,
        MANY=row.documents is not None,
        HAS_INITIAL=initial is not None,
        HAS_FINAL=final_grad is not None,
        PRECISION=dot_precision(q.dtype),
    )
    if first is not None:
        first = first * torch.exp(-row.slopes)[:, None, None]
    return q_grad, k_grad, v_grad, first
