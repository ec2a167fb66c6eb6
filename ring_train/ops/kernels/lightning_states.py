"""Pass 1 of lightning attention in Triton; how both passes fit together.

    pass 1   state before every chunk, from keys and values (backward: from queries and gradients,
             in reverse)
    pass 2   each chunk on its own: products inside the chunk, and the state before it

Unusual here:
- Chunks lie at fixed positions of the row, whatever documents it holds; masks keep documents apart.
  The work depends on the number of tokens alone.
- The row is cut into segments whose states are computed side by side, each from nothing; a third,
  small pass carries states over segments, and pass 2 adds what was carried to what is local. Else
  a single row would occupy a program for each head only.
- The reverse pass mirrors the forward one: the same kernel runs both.
- Decays are exp(-slope * distance) of distances >= 0, and what is masked is selected, never
  multiplied by 0: no slope overflows, no document poisons its neighbour.
- States are carried in fp32. Between the passes they lie in bf16 for bf16 inputs, to which pass 2
  would round them for its products anyway, and in fp32 otherwise.

In units of one [t, n, d] tensor of the input dtype, bf16 with d = dv = chunk = 128, forward moves
8 (k, v in; states out; states, q, k, v in; o out), backward 12 (q, do in; states out; both states,
q, k, v, do in; dq, dk, dv out).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ring_train.ops.kernels.launching import dot_precision, padded, tuned
from ring_train.ops.kernels.lightning_tiles import (
    decay,
    load_columns,
    load_rows,
    load_tile,
    store_tile,
)

MAX_HEAD_DIM = 128
"""Both operands of a chunk must fit in shared memory."""
MAX_COLUMNS = 64
"""Channels of a value that one program of pass 1 holds."""
PROGRAMS = 264
"""Programs that pass 1 cuts a row for: two for each multiprocessor of an H100. A constant, so that
segments, and with them rounding, are the same on every device."""


class Row(NamedTuple):
    """What the kernels know of a packed row beside its tensors."""

    slopes: Tensor
    """[n] fp32 decay rates."""
    documents: Tensor | None
    """[t] int32, document of each token; None where there is only one."""
    boundaries: Tensor | None
    """[documents + 1] int32; needed with states of documents only."""
    scale: float
    chunk_size: int
    """Tokens, a power of two from 16."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What kernels take first."""
        return self.slopes, self.documents, self.boundaries

    @property
    def block_rows(self) -> int:
        """Tokens of one program of pass 2: two make a chunk, to keep registers and occupancy."""
        return max(16, self.chunk_size // 2)

    def num_blocks(self, num_tokens: int) -> int:
        """Return the blocks of rows in all chunks of a row of so many tokens."""
        return -(-num_tokens // self.chunk_size) * (self.chunk_size // self.block_rows)


class States(NamedTuple):
    """What pass 1 leaves to pass 2."""

    local: Tensor
    """[chunks, n, d, dv] state before (in reverse: after) each chunk, of its segment alone."""
    carried: Tensor | None
    """[segments, n, d, dv] state before each segment; None for one segment."""
    chunks_per_segment: int


def strides(*tensors: Tensor) -> list[int]:
    """Return the strides of tokens and heads of each [t, n, d] tensor, whose channels touch."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def chunk_size_for(x: Tensor) -> int:
    """Return the tokens of a chunk: as many as registers hold without spills, see docs/gpu.md."""
    if x.dtype == torch.float32:
        return 32
    hopper = not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0)
    return 128 if hopper and x.dtype == torch.bfloat16 else 64


@tuned(("D", "DV", "num_heads"), (8, 3), (4, 2), (4, 3), (4, 4), first=(8, 2))
@triton.jit
def _states_kernel(
    a,
    b,
    slopes,
    documents,
    boundaries,
    initial,
    local,
    totals,
    final,
    num_tokens,
    num_heads,
    num_chunks,
    chunks_per_segment,
    a_stride_t,
    a_stride_n,
    b_stride_t,
    b_stride_n,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    REVERSE: tl.constexpr,
    MANY: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Leave the state before each chunk of one segment, and after the segment, of some channels.

    In reverse, "before" and "begin" are meant along the traversal, from the end of the row.
    """
    segment, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    slope = tl.load(slopes + head)
    state = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    first = segment * chunks_per_segment
    last = tl.minimum(first + chunks_per_segment, num_chunks)
    for step in range(first, last):
        chunk = first + last - 1 - step if REVERSE else step
        start = chunk * CHUNK
        stop = tl.minimum(start + CHUNK, num_tokens)
        rows = start + tl.arange(0, CHUNK)
        near = rows - start if REVERSE else stop - 1 - rows  # tokens to the exit of the chunk
        document = rows * 0
        entry = tl.program_id(0) * 0
        leave = tl.program_id(0) * 0
        if MANY:
            document = tl.load(documents + rows, mask=rows < num_tokens, other=-1)
            entry = tl.load(documents + (stop - 1 if REVERSE else start))
            leave = tl.load(documents + (start if REVERSE else stop - 1))
            if REVERSE:
                outside = tl.load(documents + stop, mask=stop < num_tokens, other=-1)
            else:
                outside = tl.load(documents + start - 1, mask=start > 0, other=-1)
            state = tl.where(outside == entry, state, 0.0)
        store_tile(local, chunk, head, num_heads, dim[:, None], column[None, :], state, D, DV)

        keys = load_columns(a, rows, head, a_stride_t, a_stride_n, dim, num_tokens, D)
        values = load_rows(b, rows, head, b_stride_t, b_stride_n, column, num_tokens, DV)
        if HAS_FINAL:
            # Every document that ends in this chunk (also in the loop below, if it is the last).
            for number in range(tl.minimum(entry, leave), tl.maximum(entry, leave) + 1):
                low, high = tl.load(boundaries + number), tl.load(boundaries + number + 1)
                begin = high - 1 if REVERSE else low
                end = low if REVERSE else high - 1
                if (end >= start) & (end < stop):
                    distance = rows - end if REVERSE else end - rows
                    weight = tl.where((rows >= low) & (rows < high), decay(slope, distance), 0.0)
                    left = tl.dot(
                        (keys * (weight * scale)[None, :]).to(keys.dtype),
                        values,
                        input_precision=PRECISION,
                    )
                    inside = (begin >= start) & (begin < stop)
                    if inside:
                        if HAS_INITIAL:
                            length = high - low - (1 if REVERSE else 0)
                            left += decay(slope, length) * load_tile(
                                initial,
                                number,
                                head,
                                num_heads,
                                dim[:, None],
                                column[None, :],
                                D,
                                DV,
                            )
                    else:
                        length = stop - end if REVERSE else end + 1 - start
                        left += decay(slope, length) * state
                    store_tile(
                        final, number, head, num_heads, dim[:, None], column[None, :], left, D, DV
                    )

        weight = decay(slope, near)
        if MANY:
            weight = tl.where(document == leave, weight, 0.0)
        added = tl.dot(
            (keys * (weight * scale)[None, :]).to(keys.dtype), values, input_precision=PRECISION
        )
        if HAS_INITIAL:
            # The document that leaves the chunk, if it begins in it.
            begin = tl.load(boundaries + leave + 1) - 1 if REVERSE else tl.load(boundaries + leave)
            if (begin >= start) & (begin < stop):
                distance = begin - start if REVERSE else stop - begin
                added += decay(slope, distance) * load_tile(
                    initial, leave, head, num_heads, dim[:, None], column[None, :], D, DV
                )
        kept = decay(slope, stop - start) * state
        state = tl.where(entry == leave, kept, 0.0) + added
    if totals is not None:
        store_tile(totals, segment, head, num_heads, dim[:, None], column[None, :], state, D, DV)


@triton.jit
def _carry_kernel(
    totals,
    slopes,
    documents,
    boundaries,
    carried,
    final,
    num_tokens,
    num_heads,
    num_segments,
    segment_tokens,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    MANY: tl.constexpr,
    HAS_FINAL: tl.constexpr,
):
    """Carry states over segments; complete the final states of documents that cross them."""
    head = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < D * DV
    slope = tl.load(slopes + head)
    state = tl.zeros((BLOCK,), tl.float32)
    for step in range(num_segments):
        segment = num_segments - 1 - step if REVERSE else step
        start = segment * segment_tokens
        stop = tl.minimum(start + segment_tokens, num_tokens)
        entry = tl.program_id(0) * 0
        leave = tl.program_id(0) * 0
        if MANY:
            entry = tl.load(documents + (stop - 1 if REVERSE else start))
            leave = tl.load(documents + (start if REVERSE else stop - 1))
            if REVERSE:
                outside = tl.load(documents + stop, mask=stop < num_tokens, other=-1)
            else:
                outside = tl.load(documents + start - 1, mask=start > 0, other=-1)
            state = tl.where(outside == entry, state, 0.0)
        offset = (segment * num_heads + head) * (D * DV) + element
        tl.store(carried + offset, state.to(carried.dtype.element_ty), mask=inside)
        if HAS_FINAL:
            end = tl.load(boundaries + entry) if REVERSE else tl.load(boundaries + entry + 1) - 1
            if (end >= start) & (end < stop):
                length = stop - end if REVERSE else end + 1 - start
                at = final + (entry * num_heads + head) * (D * DV) + element
                left = tl.load(at, mask=inside, other=0.0)
                tl.store(at, left + decay(slope, length) * state, mask=inside)
        kept = decay(slope, stop - start) * state
        state = tl.where(entry == leave, kept, 0.0) + tl.load(
            totals + offset, mask=inside, other=0.0
        )


def _segments(chunks: int, programs: int) -> tuple[int, int]:
    """Return (segments, chunks of each) that make enough of so many programs a segment."""
    wanted = min(chunks, -(-PROGRAMS // programs))
    chunks_per_segment = -(-chunks // wanted)
    return -(-chunks // chunks_per_segment), chunks_per_segment


def make_states(
    a: Tensor,
    b: Tensor,
    row: Row,
    *,
    initial: Tensor | None,
    with_final: bool,
    reverse: bool,
) -> tuple[States, Tensor | None]:
    """Return the state before each chunk and, if asked for, after each document, fp32.

    Args:
        a: [t, n, d] keys; in reverse queries, which then carry the scale.
        b: [t, n, dv] values; in reverse gradients of the output.
        row: of both.
        initial: [documents, n, d, dv] fp32 state before each document; in reverse the gradient of
            the one after it.
        with_final: whether states after documents are wanted; in reverse, the sums that reach the
            first token of each, which its initial state decays once more to.
        reverse: from the end of the row to its start.
    """
    (num_tokens, heads, d), dv = a.shape, b.shape[2]
    block_v = min(padded(dv), MAX_COLUMNS)
    columns = -(-dv // block_v)
    chunks = -(-num_tokens // row.chunk_size)
    segments, chunks_per_segment = _segments(chunks, heads * columns)
    state_dtype = torch.bfloat16 if a.dtype == torch.bfloat16 else torch.float32
    local = a.new_empty(chunks, heads, d, dv, dtype=state_dtype)
    totals = carried = final = None
    if segments > 1:
        totals = a.new_empty(segments, heads, d, dv, dtype=torch.float32)
        carried = torch.empty_like(totals, dtype=state_dtype)
    if with_final and row.boundaries is not None:
        final = a.new_empty(len(row.boundaries) - 1, heads, d, dv, dtype=torch.float32)
    shared: dict[str, Any] = {
        "D": d,
        "DV": dv,
        "REVERSE": reverse,
        "MANY": row.documents is not None,
        "HAS_FINAL": with_final,
    }
    _states_kernel[(segments, columns, heads)](
        *(a, b, *row.tensors, initial, local, totals, final),
        *(num_tokens, heads, chunks, chunks_per_segment, *strides(a, b)),
        row.scale if reverse else 1.0,
        BLOCK_D=padded(d),
        BLOCK_V=block_v,
        CHUNK=row.chunk_size,
        HAS_INITIAL=initial is not None,
        PRECISION=dot_precision(a.dtype),
        **shared,
    )
    if segments > 1:
        shared["BLOCK"] = min(1024, padded(d * dv))
        _carry_kernel[(-(-d * dv // shared["BLOCK"]), heads)](
            *(totals, *row.tensors, carried, final),
            *(num_tokens, heads, segments, chunks_per_segment * row.chunk_size),
            **shared,
        )
    return States(local, carried, chunks_per_segment), final
