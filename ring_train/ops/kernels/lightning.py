"""Pass 2 of lightning attention in Triton, forward; see `lightning_states`."""

import triton
import triton.language as tl
from torch import Tensor

from ring_train.ops.kernels.launching import dot_precision, padded, tuned
from ring_train.ops.kernels.lightning_states import Row, States
from ring_train.ops.kernels.lightning_tiles import (
    decay,
    dot_state,
    load_columns,
    load_rows,
    load_tile,
    state_before,
)


@tuned(("D", "DV", "num_heads"), (8, 2), (8, 3), (4, 3), first=(8, 1))
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
    MANY: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the output of one head in one chunk."""
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim, column = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    start = chunk * CHUNK
    place = tl.arange(0, CHUNK)
    rows = start + place
    slope = tl.load(slopes + head)
    query = load_rows(q, rows, head, q_stride_t, q_stride_n, dim, num_tokens, D)
    keys = load_columns(k, rows, head, k_stride_t, k_stride_n, dim, num_tokens, D)
    values = load_rows(v, rows, head, v_stride_t, v_stride_n, column, num_tokens, DV)
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
        dim[:, None],
        column[None, :],
        D,
        DV,
        CHUNK,
        False,
        MANY,
    )
    read = decay(slope, place + 1)
    weight = decay(slope, place[:, None] - place[None, :])
    if MANY:
        document = tl.load(documents + rows, mask=rows < num_tokens, other=-1)
        weight = tl.where(document[:, None] == document[None, :], weight, 0.0)
        read = tl.where(document == tl.load(documents + start), read, 0.0)
    out = read[:, None] * dot_state(query, state, PRECISION)
    if MANY:
        out = tl.where(read[:, None] > 0, out, 0.0)
    scores = tl.dot(query, keys, input_precision=PRECISION) * scale
    scores = tl.where(weight > 0, scores * weight, 0.0)
    out = scale * out + tl.dot(scores.to(values.dtype), values, input_precision=PRECISION)
    if HAS_INITIAL:
        number, beyond = tl.program_id(1) * 0, tl.program_id(1) * 0
        if MANY:
            number = tl.load(documents + start)
            beyond = tl.load(documents + tl.minimum(start + CHUNK, num_tokens) - 1)
        for begun in range(number, beyond + 1):
            low, high = tl.load(boundaries + begun), tl.load(boundaries + begun + 1)
            if low >= start:
                before = load_tile(
                    initial, begun, head, num_heads, dim[:, None], column[None, :], D, DV
                )
                seen = decay(slope, rows - low + 1)[:, None] * dot_state(query, before, PRECISION)
                own = (rows >= low) & (rows < high)
                out += tl.where(own[:, None], scale * seen, 0.0)
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
    _output_kernel[(heads, -(-num_tokens // row.chunk_size))](
        q,
        k,
        v,
        row.slopes,
        row.documents,
        row.boundaries,
        initial,
        states.local,
        states.carried,
        output,
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
        PRECISION=dot_precision(q.dtype),
    )
    return output
