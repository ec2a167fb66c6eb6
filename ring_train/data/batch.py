"""The micro batch that every part of training reads: one packed row of whole documents.

b rows of s tokens lie end to end, t = b*s. A row comes with one token more than it has positions,
so that its last position has a label. What a position sees or predicts ends with its document.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

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

    def part(self, ranges: Sequence[tuple[int, int]]) -> Batch:
        """Return the tokens in the given ranges of positions, joined in that order.

        `cu_seqlens` stays that of the whole row: positions and labels were made from it, and a
        mixer needs it to know which documents go on elsewhere.
        """
        tensors = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        boundaries = tensors.pop("cu_seqlens")
        del tensors["num_padding"]
        parts = {
            name: torch.cat([tensor[..., start:stop] for start, stop in ranges], dim=-1)
            for name, tensor in tensors.items()
        }
        num_padding = int(parts["padding_mask"].sum())
        return Batch(**parts, cu_seqlens=boundaries, num_padding=num_padding)

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
    breaks = np.zeros((b, s + 1), dtype=bool)  # where a token does not go on from the one before
    breaks[:, 0] = True
    if document_isolation:
        for row, row_breaks in zip(rows, breaks, strict=True):
            row_breaks[row.document_starts] = True
    begins = np.flatnonzero(breaks[:, :s])
    padding = -(b * s) % pad_to_multiple
    is_padding = np.ones(b * s + padding, dtype=bool)
    domains = np.zeros(b * s + padding, dtype=np.int16)
    for number, row in enumerate(rows):
        num_real = s - row.num_padding
        is_padding[number * s : number * s + num_real] = False
        domains[number * s : number * s + num_real] = row.domain
        breaks[number, num_real if row.num_padding else s + 1 :] = True
    ahead = list(_ahead(tokens, breaks, _loss_mask(rows), num_mtp + 1))
    positions = np.arange(b * s) - np.repeat(begins, np.diff(begins, append=b * s))
    ends = [b * s, *[b * s + padding] * (padding > 0)]
    return Batch(
        tokens=_flat(tokens[:, :s], padding),
        labels=_flat(ahead[0].labels, padding),
        loss_mask=_flat(ahead[0].trained, padding),
        position_ids=torch.from_numpy(np.concatenate([positions, np.arange(padding)])),
        cu_seqlens=torch.from_numpy(np.concatenate([begins, ends]).astype(np.int32)),
        domains=torch.from_numpy(domains),
        mtp_tokens=_stacked([step.ids for step in ahead[:-1]], b * s, padding),
        mtp_labels=_stacked([step.labels for step in ahead[1:]], b * s, padding),
        mtp_loss_mask=_stacked([step.trained for step in ahead[1:]], b * s, padding).bool(),
        padding_mask=torch.from_numpy(is_padding),
        num_padding=int(np.count_nonzero(is_padding)),
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


def _loss_mask(rows: Sequence[Row]) -> np.ndarray | None:
    """Return [b, s + 1] bool: tokens worth predicting; None for all."""
    if all(row.loss_mask is None for row in rows):
        return None
    ones = np.ones(len(rows[0].tokens), dtype=bool)
    return np.stack([ones if row.loss_mask is None else row.loss_mask for row in rows])


def _ahead(
    tokens: np.ndarray, breaks: np.ndarray, loss_mask: np.ndarray | None, depth: int
) -> Iterator[_Ahead]:
    """Yield the tokens 1 to `depth` ahead.

    Args:
        tokens: [b, s + 1]
        breaks: [b, s + 1] bool: the token does not go on from the one before.
        loss_mask: [b, s + 1] bool: worth predicting; None for all.
        depth: at least 1.
    """
    b, s = tokens.shape[0], tokens.shape[1] - 1
    exists = np.ones((b, s + 1), dtype=bool)
    for k in range(1, depth + 1):
        num = max(0, s + 1 - k)
        exists = exists[:, :num] & ~breaks[:, k : k + num]
        ids, labels, mask = (np.zeros((b, s), dtype=x) for x in (np.int64, np.int64, bool))
        np.copyto(ids[:, :num], tokens[:, k : k + num], where=exists)
        mask[:, :num] = exists if loss_mask is None else exists & loss_mask[:, k : k + num]
        np.copyto(labels, ids, where=mask)
        yield _Ahead(ids, labels, mask)


def _flat(values: np.ndarray, padding: int) -> Tensor:
    flat = values.reshape(-1)
    return torch.from_numpy(np.concatenate([flat, np.zeros(padding, flat.dtype)]))


def _stacked(values: list[np.ndarray], num_tokens: int, padding: int) -> Tensor:
    if not values:
        return torch.zeros(0, num_tokens + padding, dtype=torch.int64)
    return torch.stack([_flat(value, padding) for value in values])
