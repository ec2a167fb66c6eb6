"""Causal grouped-query softmax attention within the documents of a packed row."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from ring_train.ops.documents import document_indices, document_lengths
from ring_train.ops.precision import compute_dtype


def document_attention(
    q: Float[Tensor, "t n d"],
    k: Float[Tensor, "t g d"],
    v: Float[Tensor, "t g d"],
    *,
    cu_seqlens: Int[Tensor, " boundaries"],
    lengths: tuple[int, ...] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "t n d"]:
    """Return the attention output in the dtype of `q`; the softmax runs in fp32 or above.

    Query head i reads key head i // (n / g). Documents never meet in one kernel call's softmax, so
    what one gets is bit-equal whatever its neighbours hold.

    Args:
        q: queries of one packed row.
        k: keys, of fewer heads.
        v: values.
        cu_seqlens: [documents + 1], from 0 to t, strictly increasing.
        lengths: host copy of the lengths; spares a sync if cu_seqlens is not on the CPU.
        scale: of the scores, default d ** -0.5.
    """
    _check_inputs(q, k, v)
    lengths = document_lengths(cu_seqlens, q.shape[0], lengths)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_attend(*part, scale) for part in parts])


def piece_attention(
    q: Float[Tensor, "t_own n d"],
    k: Float[Tensor, "t g d"],
    v: Float[Tensor, "t g d"],
    *,
    pieces: Sequence[tuple[int, int, int]],
    scale: float | None = None,
) -> Float[Tensor, "t_own n d"]:
    """Return the attention of some queries of a packed row to the keys of the whole row.

    Args:
        q: queries of this rank, piece after piece.
        k: keys of the row, in order, of fewer heads.
        v: values.
        pieces: per piece of a document where it starts and stops in the row, and where its
            document starts: its queries see the keys from there to themselves.
        scale: of the scores, default d ** -0.5.
    """
    if sum(stop - start for start, stop, _ in pieces) != q.shape[0]:
        raise ValueError(f"pieces={pieces} are not the {q.shape[0]} queries; see the docstring")
    queries = q.split([stop - start for start, stop, _ in pieces])
    outputs = []
    for run in _adjacent(pieces):
        # One slice for many documents: the backward of a slice fills a tensor of the whole row.
        first, end = run[0][2], run[-1][1]
        lengths = [stop - document_start for _, stop, document_start in run]
        for key, value in zip(
            k[first:end].split(lengths), v[first:end].split(lengths), strict=True
        ):
            outputs.append(_attend(queries[len(outputs)], key, value, scale))
    return torch.cat(outputs)


def cached_attention(
    q: Float[Tensor, "b n d"],
    k: Float[Tensor, "b l g d"],
    v: Float[Tensor, "b l g d"],
    *,
    lengths: Int[Tensor, " b"],
    scale: float | None = None,
) -> Float[Tensor, "b n d"]:
    """Return the attention of one query per sequence to that sequence's cached keys.

    What lies in a cache behind the end of its sequence has no weight, but must be finite.

    Args:
        q: queries.
        k: keys of fewer heads, the query's own among them.
        v: values.
        lengths: keys of each sequence, 1 to l.
        scale: of the scores, default d ** -0.5.
    """
    b, n, d = q.shape
    heads = k.shape[2]
    if k.shape != v.shape or k.shape[::3] != (b, d) or n % heads:
        raise ValueError(
            f"q={tuple(q.shape)}, k={tuple(k.shape)}, v={tuple(v.shape)} are not [b, n, d], "
            "[b, l, g, d], [b, l, g, d] with n a multiple of g; see the docstring"
        )
    visible = torch.arange(k.shape[1], device=q.device) < lengths[:, None]  # [b, l]
    # The queries of a group are rows of one product: they share its keys.
    output = F.scaled_dot_product_attention(
        q.view(b, heads, n // heads, d),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible[:, None, None, :],
        scale=scale,
    )
    return output.reshape(b, n, d)


def _adjacent(pieces: Sequence[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Return pieces in runs whose keys lie end to end."""
    runs: list[list[tuple[int, int, int]]] = []
    for piece in pieces:
        if runs and piece[2] == runs[-1][-1][1]:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return runs


def _attend(
    q: Float[Tensor, "t_own n d"],
    k: Float[Tensor, "t g d"],
    v: Float[Tensor, "t g d"],
    scale: float | None,
) -> Float[Tensor, "t_own n d"]:
    """Return causal attention where the last query sees every key."""
    causal = q.shape[0] == k.shape[0]
    mask = None if causal else _lower_right(q.shape[0], k.shape[0])
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k, v))
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    return output[0].transpose(0, 1)


def _lower_right(num_queries: int, num_keys: int) -> Tensor:
    """Return a causal mask where the last query sees the last key, without elements.

    torch's `causal_lower_right` (2.11) allocates 8 bytes for each pair of query and key beside it.
    """
    mask = Tensor.__new__(CausalBias)
    CausalBias.__init__(mask, CausalVariant.LOWER_RIGHT, num_queries, num_keys)
    return mask


def document_attention_reference(
    q: Float[Tensor, "t n d"],
    k: Float[Tensor, "t g d"],
    v: Float[Tensor, "t g d"],
    *,
    cu_seqlens: Int[Tensor, " boundaries"],
    scale: float | None = None,
) -> Float[Tensor, "t n d"]:
    """Return what `document_attention` returns, from the whole masked score matrix: the oracle."""
    dtype = compute_dtype(q.dtype)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    heads_per_group = q.shape[1] // k.shape[1]
    key = k.to(dtype).repeat_interleave(heads_per_group, dim=1)
    value = v.to(dtype).repeat_interleave(heads_per_group, dim=1)
    documents = document_indices(cu_seqlens, q.shape[0]).to(q.device)
    visible = (documents[:, None] == documents[None, :]).tril()
    scores = scale * torch.einsum("ind,jnd->nij", q.to(dtype), key)
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    return torch.einsum("nij,jnd->ind", weights, value).to(q.dtype)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q={tuple(q.shape)}, k={tuple(k.shape)}, v={tuple(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or k.shape[::2] != q.shape[::2]:
        raise ValueError(f"{shapes} are not [t, n, d], [t, g, d], [t, g, d]; see the docstring")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: key heads do not divide query heads; repeat or drop heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype")
    compute_dtype(q.dtype)
