"""Lightning attention in torch: chunks of a row by matrix products.

- Chunk states are scanned by matrix products over blocks of chunks, recursively over blocks.
- Decays are exp(-slope * distance) of distances >= 0, never a quotient of two exponentials, so no
  slope or length overflows.
- Inputs below fp32 are computed in fp32, fp64 in fp64.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ring_train.ops.decay import decay_weights
from ring_train.ops.documents import document_indices
from ring_train.ops.lightning_inputs import LightningInputs
from ring_train.ops.lightning_state import read_state
from ring_train.ops.precision import compute_dtype

SCAN_BLOCK = 64
"""Chunks that one matrix product scans; more are scanned in blocks of this many."""
CHUNK_SIZE = 64
"""Tokens of a chunk unless told."""


def chunked_attention(
    inputs: LightningInputs, chunk_size: int | None
) -> tuple[Float[Tensor, "t n dv"], Float[Tensor, "documents n d dv"] | None]:
    """Return what `lightning_attention` does."""
    q, k, v, slopes, cu_seqlens, lengths, scale, _, _, output_final_state = inputs
    initial_state = inputs.initial_states
    assert lengths is not None
    documents = None
    if len(lengths) > 1:
        documents = document_indices(cu_seqlens, q.shape[0]).to(q.device)
    rates = slopes.detach().double()
    row = _Row(rates, documents, scale, chunk_size or CHUNK_SIZE)
    if initial_state is None and not output_final_state:
        return _ChunkedAttention.apply(q, k, v, row).to(q.dtype), None
    dtype, output_dtype = compute_dtype(q.dtype), q.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)  # once: gradients are summed, then rounded
    output = _ChunkedAttention.apply(q, k, v, row)
    before = None
    if initial_state is not None:
        before = initial_state.to(dtype)
        output = output + scale * _read_initial(q, rates, lengths, before)
    final_state = _final_state(k, v, rates, lengths, before) if output_final_state else None
    return output.to(output_dtype), final_state


class _Row(NamedTuple):
    """What does not depend on the values of a row."""

    rates: Float[Tensor, " n"]
    """Decay rates, float64."""
    documents: Int[Tensor, " t"] | None
    """Document of each token; None where there is only one."""
    scale: float
    chunk_size: int


class _Weights(NamedTuple):
    """Decay weights of a row in chunks, exact zeros between documents."""

    inside: Float[Tensor, "n 1 c c"]
    """Of key j for query r of the same chunk and document."""
    same: Float[Tensor, "chunks c c"] | None
    """1 where r and j are of one document; None where all are."""
    read: Float[Tensor, "n chunks_or_1 c 1"]
    """Of the state before the chunk for query r."""
    write: Float[Tensor, "n chunks_or_1 c 1"]
    """Of key r in the state after the chunk."""
    first: Int[Tensor, " chunks"]
    """Document of the first token of each chunk."""
    last: Int[Tensor, " chunks"]
    """Document of the last token of each chunk."""


class _ChunkedAttention(torch.autograd.Function):
    """Output in the compute dtype; keeps the inputs and the state before each chunk."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: _Row) -> Tensor:
        dtype = compute_dtype(q.dtype)
        weights = _make_weights(row, q.shape[0], dtype)
        qc, kc, vc = (_to_chunks(x, row.chunk_size, dtype) for x in (q, k, v))
        qc.mul_(row.scale)
        updates = (kc * weights.write).mT @ vc  # [n, chunks, d, dv]
        states = _scan(updates, row, weights, reverse=False)
        output = _masked_product(qc, kc, weights) @ vc  # [n, chunks, c, dv]
        output = _add_product(output, qc * weights.read, states)
        ctx.save_for_backward(q, k, v, states)
        ctx.row = row
        return _to_row(output, q.shape[0])

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override] -- once_differentiable hides the name of ctx
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, states = ctx.saved_tensors
        row: _Row = ctx.row
        num_tokens, dtype = q.shape[0], grad.dtype
        weights = _make_weights(row, num_tokens, dtype)
        qc, kc, vc, gc = (_to_chunks(x, row.chunk_size, dtype) for x in (q, k, v, grad))
        gc.mul_(row.scale)
        gr, kw, vw = gc * weights.read, kc * weights.write, vc * weights.write
        update_grad = _scan(qc.mT @ gr, row, weights, reverse=True)  # [n, chunks, d, dv]
        score_grad = _masked_product(gc, vc, weights)  # [n, chunks, c, c]
        q_grad = _add_product(score_grad @ kc, gr, states.mT)
        k_grad = _add_product(score_grad.mT @ qc, vw, update_grad.mT)
        v_grad = _add_product(_masked_product(qc, kc, weights).mT @ gc, kw, update_grad)
        grads = (_to_row(x, num_tokens).to(q.dtype) for x in (q_grad, k_grad, v_grad))
        return *grads, None


def _make_weights(row: _Row, num_tokens: int, dtype: torch.dtype) -> _Weights:
    rates, size = row.rates, row.chunk_size
    chunks = -(-num_tokens // size)
    place = torch.arange(size, device=rates.device)
    inside = decay_weights(rates, place[:, None] - place[None, :], dtype).unsqueeze(
        1
    )  # [n, 1, c, c]
    read = decay_weights(rates, place + 1, dtype)[:, None, :, None]  # [n, 1, c, 1]
    write = decay_weights(rates, size - 1 - place, dtype)[:, None, :, None]
    if row.documents is None:
        one = torch.zeros(chunks, dtype=torch.int64, device=rates.device)
        return _Weights(inside, None, read, write, one, one)
    filled = row.documents[-1:].expand(chunks * size - num_tokens)
    documents = torch.cat([row.documents, filled]).view(chunks, size)
    first, last = documents[:, :1], documents[:, -1:]
    return _Weights(
        inside,
        (documents[:, :, None] == documents[:, None, :]).to(dtype),
        read * (documents == first)[:, :, None],
        write * (documents == last)[:, :, None],
        first.squeeze(1),
        last.squeeze(1),
    )


def _masked_product(
    a: Float[Tensor, "n chunks c d"], b: Float[Tensor, "n chunks c d"], weights: _Weights
) -> Float[Tensor, "n chunks c c"]:
    """Return a @ b^T within chunks, times the weights inside a chunk."""
    product = (a @ b.mT).mul_(weights.inside)
    return product if weights.same is None else product.mul_(weights.same)


def _scan(
    updates: Float[Tensor, "n chunks d dv"], row: _Row, weights: _Weights, *, reverse: bool
) -> Float[Tensor, "n chunks d dv"]:
    """Return the state before each chunk from each chunk's update; `reverse`: the transpose."""
    rates = row.rates * row.chunk_size
    states = _scan_flat(updates.flatten(2), rates, weights.first, weights.last, reverse)
    return states.view_as(updates)


def _scan_flat(
    updates: Float[Tensor, "n chunks m"],
    rates: Float[Tensor, " n"],
    first: Int[Tensor, " chunks"],
    last: Int[Tensor, " chunks"],
    reverse: bool,
) -> Float[Tensor, "n chunks m"]:
    """Scan rows that decay by `rates` per row; row a reaches row b > a if last[a] == first[b]."""
    heads, chunks, width = updates.shape
    if chunks <= SCAN_BLOCK:
        return _transfer(rates, first, last, updates.dtype, reverse) @ updates
    blocks = -(-chunks // SCAN_BLOCK)
    padding = blocks * SCAN_BLOCK - chunks
    updates = F.pad(updates, (0, 0, 0, padding)).view(heads, blocks, SCAN_BLOCK, width)
    first = torch.cat([first, last[-1:].expand(padding)]).view(blocks, SCAN_BLOCK)
    last = torch.cat([last, last[-1:].expand(padding)]).view(blocks, SCAN_BLOCK)
    place = torch.arange(SCAN_BLOCK, device=updates.device)
    read = decay_weights(rates, place, updates.dtype)[:, None] * (first == first[:, :1])
    write = decay_weights(rates, SCAN_BLOCK - 1 - place, updates.dtype)[:, None] * (
        last == last[:, -1:]
    )
    if reverse:
        read, write = write, read
    block_updates = (write.unsqueeze(2) @ updates).squeeze(2)  # [n, blocks, m]
    carried = _scan_flat(block_updates, rates * SCAN_BLOCK, first[:, 0], last[:, -1], reverse)
    states = _transfer(rates, first, last, updates.dtype, reverse) @ updates
    states.addcmul_(read.unsqueeze(3), carried.unsqueeze(2))
    return states.view(heads, -1, width)[:, :chunks]


def _transfer(
    rates: Float[Tensor, " n"],
    first: Int[Tensor, "*blocks chunks"],
    last: Int[Tensor, "*blocks chunks"],
    dtype: torch.dtype,
    reverse: bool,
) -> Float[Tensor, "n *blocks chunks chunks"]:
    """Return the weight of row a's update in the state before row b (transposed if `reverse`)."""
    place = torch.arange(first.shape[-1], device=first.device)
    decay = decay_weights(rates, place[:, None] - 1 - place[None, :], dtype)
    decay = decay.view(-1, *(1 for _ in first.shape[1:]), *decay.shape[1:])
    transfer = decay * (first[..., :, None] == last[..., None, :])
    return transfer.mT if reverse else transfer


def _add_product(
    x: Float[Tensor, "n chunks r m"],
    a: Float[Tensor, "n chunks r d"],
    b: Float[Tensor, "n chunks d m"],
) -> Float[Tensor, "n chunks r m"]:
    """Add a @ b to `x` in place."""
    x.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1))
    return x


def _to_chunks(
    x: Float[Tensor, "t n d"], chunk_size: int, dtype: torch.dtype
) -> Float[Tensor, "n chunks c d"]:
    """Return a fresh copy of a row in chunks, the last one filled with zeros."""
    num_tokens, heads, dim = x.shape
    chunks = -(-num_tokens // chunk_size)
    out = x.new_empty(heads, chunks * chunk_size, dim, dtype=dtype)
    out[:, :num_tokens].copy_(x.transpose(0, 1))
    out[:, num_tokens:].zero_()
    return out.view(heads, chunks, chunk_size, dim)


def _to_row(x: Float[Tensor, "n chunks c d"], num_tokens: int) -> Float[Tensor, "t n d"]:
    return x.flatten(1, 2)[:, :num_tokens].transpose(0, 1).contiguous()


def _read_initial(
    q: Float[Tensor, "t n d"],
    rates: Float[Tensor, " n"],
    lengths: tuple[int, ...],
    state: Float[Tensor, "documents n d dv"],
) -> Float[Tensor, "t n dv"]:
    """Return what each token reads from the state before its document."""
    parts = zip(q.split(lengths), state, strict=True)
    return torch.cat([read_state(part, before, rates) for part, before in parts])


def _final_state(
    k: Float[Tensor, "t n d"],
    v: Float[Tensor, "t n dv"],
    rates: Float[Tensor, " n"],
    lengths: tuple[int, ...],
    initial_state: Float[Tensor, "documents n d dv"] | None,
) -> Float[Tensor, "documents n d dv"]:
    """Return the state after the last token of each document."""
    counts = torch.tensor(lengths, device=k.device)
    ends = torch.repeat_interleave(counts.cumsum(0), counts, output_size=k.shape[0])
    ages = ends - 1 - torch.arange(k.shape[0], device=k.device)  # [t], of each token at its end
    left = k * decay_weights(rates, ages, k.dtype).mT.unsqueeze(2)  # [t, n, d]
    keys, values = left.permute(1, 2, 0), v.transpose(0, 1)  # [n, d, t], [n, t, dv]
    parts = zip(keys.split(lengths, 2), values.split(lengths, 1), strict=True)
    states = torch.stack([key @ value for key, value in parts])
    if initial_state is None:
        return states
    kept = decay_weights(rates, counts, k.dtype).mT[:, :, None, None]  # [documents, n, 1, 1]
    return states + kept * initial_state
