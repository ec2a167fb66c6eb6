"""The micro batch that every part of training reads: one packed row of whole documents.

b rows of s tokens lie end to end, t = b*s. A row comes with one token more than it has positions,
so that its last position has a label. What a position sees or predicts ends with its document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """Consecutive tokens of one domain."""

    tokens: np.ndarray
    """[s + 1] ids; the last one is only a label."""
    domain: int
    """Index into the sorted domain names."""
    document_starts: np.ndarray
    """Positions in 1..s where another document begins, ascending; one where the padding begins."""
    num_padding: int = 0
    """Positions at the end, of the first s, that are not data."""
    loss_mask: np.ndarray | None = None
    """[s + 1] bool: tokens that are worth predicting; None for all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro batch. Depth k below counts MTP layers from 1; index k - 1 holds it."""

    tokens: Tensor
    """[t] int64"""
    labels: Tensor
    """[t] int64: the next token; 0 where `loss_mask` is false."""
    loss_mask: Tensor
    """[t] bool: the next token exists in the document."""
    position_ids: Tensor
    """[t] int64: from 0 in every document."""
    cu_seqlens: Tensor
    """[documents + 1] int32: where documents begin, and t."""
    domains: Tensor
    """[t] int16: index into the sorted domain names; 0 on padding."""
    mtp_tokens: Tensor
    """[depth, t] int64: the token k ahead; 0 where the document has none."""
    mtp_labels: Tensor
    """[depth, t] int64: the token k + 1 ahead; 0 where `mtp_loss_mask` is false."""
    mtp_loss_mask: Tensor
    """[depth, t] bool"""
    padding_mask: Tensor
    """[t] bool: not data. Padding is a document of its own and has no label."""
    num_padding: int
    """How many that are."""

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del tensors["num_padding"]
        moved = {name: tensor.to(device) for name, tensor in tensors.items()}
        return Batch(**moved, num_padding=self.num_padding)


def make_batch(
    rows: Sequence[Row], *, document_isolation: bool, num_mtp: int, pad_to_multiple: int = 1
) -> Batch:
    """Return the micro batch of rows of one length.

    With `document_isolation`, a document ends where the next begins, and the last token of a
    document has no label. Without it, a row is one document, whatever it contains. A document that
    is cut by the end of a row is a document in each row.

    Args:
        rows: at least one.
        document_isolation: see above.
        num_mtp: depths of multi-token prediction; targets past a row's extra token are masked.
        pad_to_multiple: t is filled up to a multiple with one document of padding.
    """
    tokens = np.stack([row.tokens for row in rows]).astype(np.int64)  # [b, s + 1]
    b, s = tokens.shape[0], tokens.shape[1] - 1
    starts = np.zeros((b, s + 1), dtype=bool)
    starts[:, 0] = True
    real = np.arange(s + 1) < np.array([[_num_real(row, s)] for row in rows])  # [b, s + 1]
    trained = real.copy()
    for row, row_starts, row_trained in zip(rows, starts, trained, strict=True):
        if document_isolation:
            row_starts[row.document_starts] = True
        if row.loss_mask is not None:
            np.logical_and(row_trained, row.loss_mask, out=row_trained)
    documents = np.cumsum(starts, axis=1) * real  # [b, s + 1], from 1 in every row, 0 = none
    ahead = [_ahead(tokens, documents, trained, k) for k in range(1, num_mtp + 2)]
    padding = -(b * s) % pad_to_multiple
    ends = [b * s, *[b * s + padding] * (padding > 0)]
    first = np.maximum.accumulate(np.where(starts[:, :s], np.arange(s), 0), axis=1)
    domains = np.array([[row.domain] for row in rows], dtype=np.int16) * real[:, :s]
    padding_mask = torch.cat([_flat(~real[:, :s], 0), torch.ones(padding, dtype=torch.bool)])
    return Batch(
        tokens=_flat(tokens[:, :s], padding),
        labels=_flat(ahead[0].labels, padding),
        loss_mask=_flat(ahead[0].trained, padding),
        position_ids=torch.cat([_flat(np.arange(s) - first, 0), torch.arange(padding)]),
        cu_seqlens=torch.from_numpy(
            np.concatenate([np.flatnonzero(starts[:, :s]), ends]).astype(np.int32)
        ),
        domains=_flat(domains.astype(np.int16), padding),
        mtp_tokens=_stacked([step.ids for step in ahead[:-1]], b * s, padding),
        mtp_labels=_stacked([step.labels for step in ahead[1:]], b * s, padding),
        mtp_loss_mask=_stacked([step.trained for step in ahead[1:]], b * s, padding).bool(),
        padding_mask=padding_mask,
        num_padding=int(padding_mask.sum()),
    )


def pack_documents(
    documents: Sequence[Sequence[int]], *, num_mtp: int, pad_to_multiple: int = 1
) -> Batch:
    """Return one packed row of whole documents that do not see each other, all of domain 0.

    The last token of a document has no label.
    """
    lengths = np.array([len(document) for document in documents])
    if len(lengths) == 0 or lengths.min() == 0:
        raise ValueError(f"documents have lengths {lengths.tolist()}; give each at least one token")
    ends = np.cumsum(lengths)
    tokens = np.concatenate([*(np.asarray(document) for document in documents), [0]])
    row = Row(tokens=tokens, domain=0, document_starts=ends)
    return make_batch(
        [row], document_isolation=True, num_mtp=num_mtp, pad_to_multiple=pad_to_multiple
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Ahead:
    """The token k positions ahead in the same document, each [b, s]."""

    ids: np.ndarray
    """0 where there is none."""
    labels: np.ndarray
    """0 where it is not trained."""
    trained: np.ndarray


def _num_real(row: Row, s: int) -> int:
    """Return how many of the s + 1 tokens of a row are data."""
    return s - row.num_padding if row.num_padding else s + 1


def _ahead(tokens: np.ndarray, documents: np.ndarray, trained: np.ndarray, k: int) -> _Ahead:
    """Return the tokens k ahead.

    Args:
        tokens: [b, s + 1]
        documents: [b, s + 1] number of the document in its row; 0 for no data.
        trained: [b, s + 1] bool: worth predicting.
        k: from 1.
    """
    b, s = tokens.shape[0], tokens.shape[1] - 1
    ids, mask = np.zeros((b, s), dtype=np.int64), np.zeros((b, s), dtype=bool)
    num = max(0, s + 1 - k)
    here, there = documents[:, :num], documents[:, k : k + num]
    exists = (here == there) & (there > 0)
    ids[:, :num] = np.where(exists, tokens[:, k : k + num], 0)
    mask[:, :num] = exists & trained[:, k : k + num]
    return _Ahead(ids, np.where(mask, ids, 0), mask)


def _flat(values: np.ndarray, padding: int) -> Tensor:
    return torch.from_numpy(np.pad(values.reshape(-1), (0, padding)))


def _stacked(values: list[np.ndarray], num_tokens: int, padding: int) -> Tensor:
    if not values:
        return torch.zeros(0, num_tokens + padding, dtype=torch.int64)
    return torch.stack([_flat(value, padding) for value in values])
