"""Causal grouped-query softmax attention within the documents of a packed row."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

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
    outputs = []
    parts = (x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v))
    for query, key, value in zip(*parts, strict=True):
        part = F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True
        )
        outputs.append(part[0].transpose(0, 1))
    return torch.cat(outputs)


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
