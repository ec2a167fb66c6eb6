"""Pass 2 of lightning attention in Triton, forward; see `lightning_states`."""

import triton
import triton.language as tl
from torch import Tensor

from ring_train.ops.kernels.launching import dot_precision, padded, tuned
from ring_train.ops.kernels.lightning_states import Row, States, strides
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
def _output_kernel(
    q,
    k,
    v,
    slopes,
    documents,
    boundaries,
    initial,
    local,
    carried,
    output,
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
    PRECISION: tl.constexpr,
):
    """Compute the output of one head for some rows of a chunk."""
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1) % (CHUNK // ROWS)
    chunk = tl.program_id(1) // (CHUNK // ROWS)
    dim, column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    start = chunk * CHUNK
    rows = start + block * ROWS + tl.arange(0, ROWS)
    slope = tl.load(slopes + head)
    query = load_rows(q, rows, head, q_stride_t, q_stride_n, dim, num_tokens, D)
    left = 0.0
    if carried is not None:
        left = carried_weight(
            documents, slope, chunk, num_tokens, chunks_per_segment, CHUNK, False, MANY
        )
    out = read_states(
        query,
        local,
        carried,
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
    read = boundary_weight(slope, rows - start + 1, documents, rows, start, num_tokens, MANY)
    out = tl.where(read[:, None] > 0, scale * read[:, None] * out, 0.0)
    for other in range(block + 1):
        seen = start + other * ROWS + tl.arange(0, ROWS)
        keys = load_columns(k, seen, head, k_stride_t, k_stride_n, dim, num_tokens, D)
        values = load_rows(v, seen, head, v_stride_t, v_stride_n, column, num_tokens, DV)
        weight = pair_weight(slope, documents, rows, seen, num_tokens, MANY)
        scores = tl.dot(query, keys, input_precision=PRECISION)
        scores = tl.where(weight > 0, scores * (weight * scale), 0.0)
        out += tl.dot(scores.to(values.dtype), values, input_precision=PRECISION)
    if HAS_INITIAL:
        entry = tl.program_id(1) * 0
        leave = tl.program_id(1) * 0
        if MANY:
            entry = tl.load(documents + start)
            leave = tl.load(documents + tl.minimum(start + CHUNK, num_tokens) - 1)
        for begun in range(entry, leave + 1):
            low, high = tl.load(boundaries + begun), tl.load(boundaries + begun + 1)
            if low >= start:
                before = load_tile(
                    initial, begun, head, num_heads, dim[:, None], column[None, :], D, DV
                )
                found = decay(slope, rows - low + 1)[:, None] * dot_state(query, before, PRECISION)
                own = (rows >= low) & (rows < high)
                out += tl.where(own[:, None], scale * found, 0.0)
    at = output + (rows.to(tl.int64)[:, None] * num_heads + head) * DV + column[None, :]
    tl.store(
        at,
        out.to(output.dtype.element_ty),
        mask=(rows[:, None] < num_tokens) & (column[None, :] < DV),
    )


def make_output(
    q: Tensor, k: Tensor, v: Tensor, row: Row, states: States, *, initial: Tensor | None
) -> Tensor:
    """Return the output [t, n, dv] in the dtype of `q`; arguments as in `make_states`."""
    num_tokens, heads, d = q.shape
    dv = v.shape[2]
    output = q.new_empty(num_tokens, heads, dv)
    _output_kernel[(heads, row.num_blocks(num_tokens))](
        *(q, k, v, *row.tensors, initial, states.local, states.carried, output),
        *(num_tokens, heads, states.chunks_per_segment, *strides(q, k, v), row.scale),
        D=d,
        DV=dv,
        BLOCK_D=padded(d),
        BLOCK_V=padded(dv),
        CHUNK=row.chunk_size,
        ROWS=row.block_rows,
        MANY=row.documents is not None,
        HAS_INITIAL=initial is not None,
        PRECISION=dot_precision(q.dtype),
    )
    return output
