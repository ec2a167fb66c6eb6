"""What the kernels of lightning attention share: tiles of tensors, decays, states of chunks."""

import triton
import triton.language as tl


@triton.jit
def decay(slope, distance):
    """Return exp(-slope * distance), 0 for a distance < 0."""
    return tl.where(distance >= 0, tl.exp(-slope * tl.maximum(distance, 0).to(tl.float32)), 0.0)


@triton.jit
def dot_state(x, state, PRECISION: tl.constexpr):
    """Return x @ state: fp16 and fp32 as (t)f32, which has the range of states, else in bf16."""
    if x.dtype == tl.bfloat16:
        return tl.dot(x, state.to(tl.bfloat16))
    return tl.dot(x.to(tl.float32), state.to(tl.float32), input_precision=PRECISION)


@triton.jit
def load_rows(x, rows, head, stride_t, stride_n, column, num_tokens, SIZE: tl.constexpr):
    """Return x[rows, head, column], zero outside: [rows, columns]."""
    at = x + rows.to(tl.int64)[:, None] * stride_t + head * stride_n + column[None, :]
    return tl.load(at, mask=(rows[:, None] < num_tokens) & (column[None, :] < SIZE), other=0.0)


@triton.jit
def load_columns(x, rows, head, stride_t, stride_n, column, num_tokens, SIZE: tl.constexpr):
    """Return the transpose of `load_rows`: [columns, rows]."""
    at = x + rows.to(tl.int64)[None, :] * stride_t + head * stride_n + column[:, None]
    return tl.load(at, mask=(rows[None, :] < num_tokens) & (column[:, None] < SIZE), other=0.0)


@triton.jit
def load_tile(x, index, head, num_heads, dim, channel, D: tl.constexpr, DV: tl.constexpr):
    """Return x[index, head, dim, channel], zero outside; `head` is int64."""
    at = x + (index * num_heads + head) * (D * DV) + dim * DV + channel
    return tl.load(at, mask=(dim < D) & (channel < DV), other=0.0)


@triton.jit
def store_tile(x, index, head, num_heads, dim, channel, value, D: tl.constexpr, DV: tl.constexpr):
    """Store `value` at x[index, head, dim, channel] in its dtype; `head` is int64."""
    at = x + (index * num_heads + head) * (D * DV) + dim * DV + channel
    tl.store(at, value.to(x.dtype.element_ty), mask=(dim < D) & (channel < DV))


@triton.jit
def carried_weight(
    documents,
    slope,
    chunk,
    num_tokens,
    chunks_per_segment,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    MANY: tl.constexpr,
):
    """Return how much of the state carried into its segment is left before a chunk.

    "Before" is meant along the traversal, in reverse from the end of the row.
    """
    segment = chunk // chunks_per_segment
    if REVERSE:
        edge = tl.minimum((segment + 1) * chunks_per_segment * CHUNK, num_tokens)
        here = tl.minimum((chunk + 1) * CHUNK, num_tokens)
        weight = decay(slope, edge - here)
    else:
        edge = segment * chunks_per_segment * CHUNK
        here = chunk * CHUNK
        weight = decay(slope, here - edge)
    if MANY:
        # Of the token just before the segment, and of the one just inside this chunk.
        if REVERSE:
            outside = tl.load(documents + edge, mask=edge < num_tokens, other=-1)
            inside = tl.load(documents + here - 1)
        else:
            outside = tl.load(documents + edge - 1, mask=edge > 0, other=-1)
            inside = tl.load(documents + here)
        weight = tl.where(outside == inside, weight, 0.0)
    return weight


@triton.jit
def read_states(
    x,
    local,
    carried,
    weight,
    chunk,
    chunks_per_segment,
    head,
    num_heads,
    dim,
    channel,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return x @ (local + weight * carried) of a chunk; `dim` and `channel` lie as x needs them."""
    found = dot_state(x, load_tile(local, chunk, head, num_heads, dim, channel, D, DV), PRECISION)
    if carried is not None:
        segment = chunk // chunks_per_segment
        state = load_tile(carried, segment, head, num_heads, dim, channel, D, DV)
        found += tl.where(weight > 0, weight * dot_state(x, state, PRECISION), 0.0)
    return found


@triton.jit
def pair_weight(slope, documents, later, earlier, num_tokens, MANY: tl.constexpr):
    """Return the weight of earlier tokens for later ones: [later, earlier], 0 where not seen."""
    weight = decay(slope, later[:, None] - earlier[None, :])
    if MANY:
        a = tl.load(documents + later, mask=later < num_tokens, other=-1)
        b = tl.load(documents + earlier, mask=earlier < num_tokens, other=-1)
        weight = tl.where(a[:, None] == b[None, :], weight, 0.0)
    return weight


@triton.jit
def boundary_weight(slope, distance, documents, rows, edge, num_tokens, MANY: tl.constexpr):
    """Return the weight of a state at the edge of a chunk for its rows: 0 in other documents."""
    weight = decay(slope, distance)
    if MANY:
        document = tl.load(documents + rows, mask=rows < num_tokens, other=-1)
        weight = tl.where(document == tl.load(documents + edge), weight, 0.0)
    return weight
