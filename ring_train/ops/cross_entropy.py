"""Cross-entropy of logits that exist only a tile at a time: what is computed of each tile.

A tile is logits of some tokens and some neighbouring ids of the vocabulary. A label is counted from
the first id of the tile; one outside the tile belongs to another tile, perhaps of another rank.
Statistics of tiles, and of ranks, are joined by `joined_statistics`.
"""

from math import isqrt
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ring_train.ops.backends import resolve_backend
from ring_train.ops.precision import compute_dtype

COLUMN_MULTIPLE = 64
"""Ids of a tile, where it has not all: rows of logits then begin at whole cache lines."""


class Tile(NamedTuple):
    """Sizes of the tiles that a backward goes through."""

    tokens: int
    ids: int
    """Of the vocabulary."""


def logit_statistics(
    logits: Float[Tensor, "t v"], labels: Int[Tensor, " t"], *, backend: str = "auto"
) -> Float[Tensor, "3 t"]:
    """Return the largest logit, the sum of exp(logit - largest), and the label's logit, by row.

    The last is 0 where the label is of another tile. fp32, or fp64 for fp64 logits.

    Raises:
        ValueError: shapes, a dtype or the backend do not fit.
    """
    dtype = compute_dtype(logits.dtype)
    _check_rows(logits, labels=labels)
    if resolve_backend(backend, logits) == "triton":
        from ring_train.ops.kernels.cross_entropy import make_statistics

        return joined_statistics(make_statistics(logits, labels))
    logits = logits.to(dtype)
    largest = logits.amax(-1)
    total = (logits - largest[:, None]).exp_().sum(-1)
    here = (labels >= 0) & (labels < logits.shape[1])
    found = logits.gather(1, labels.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
    return torch.stack([largest, total, torch.where(here, found, 0)])


def joined_statistics(statistics: Float[Tensor, "parts 3 t"]) -> Float[Tensor, "3 t"]:
    """Return the statistics of rows whose parts are given, added in the order of the parts."""
    largest, totals, found = statistics.unbind(1)  # [parts, t] each
    overall = largest.amax(0)
    total = (totals * (largest - overall).exp()).sum(0)
    return torch.stack([overall, total, found.sum(0)])


def losses_of(
    statistics: Float[Tensor, "3 t"],
) -> tuple[Float[Tensor, " t"], Float[Tensor, " t"]]:
    """Return (losses, log-sum-exp) of the statistics of whole rows."""
    largest, total, found = statistics
    log_sum_exp = largest + total.log()
    return log_sum_exp - found, log_sum_exp


@torch.no_grad()
def logits_to_gradient_(
    logits: Float[Tensor, "t v"],
    labels: Int[Tensor, " t"],
    log_sum_exp: Float[Tensor, " t"],
    grad: Float[Tensor, " t"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "t v"]:
    """Return `logits`, whose values are now (softmax - one at the label) * grad.

    Computed in fp32 (fp64), the label's one included, and rounded once.

    Args:
        logits: of a tile; overwritten.
        labels: see the module.
        log_sum_exp: of the whole rows, of `losses_of`.
        grad: gradient of each row's loss.
        backend: auto, torch or triton.

    Raises:
        ValueError: shapes, a dtype or the backend do not fit.
    """
    dtype = compute_dtype(logits.dtype)
    _check_rows(logits, labels=labels, log_sum_exp=log_sum_exp, grad=grad)
    if resolve_backend(backend, logits) == "triton":
        from ring_train.ops.kernels.cross_entropy import turn_into_gradient_

        return turn_into_gradient_(logits, labels, log_sum_exp, grad)
    wide = logits.to(dtype)  # the logits themselves, where they are wide
    wide.sub_(log_sum_exp[:, None]).exp_()
    here = (labels >= 0) & (labels < logits.shape[1])
    index = labels.clamp(0, logits.shape[1] - 1)[:, None]
    wide.scatter_add_(1, index, -here[:, None].to(dtype)).mul_(grad[:, None])
    return wide if wide is logits else logits.copy_(wide)


def check_labels(labels: Int[Tensor, " t"], vocab_size: int) -> None:
    """Refuse labels outside the vocabulary; on a GPU when it gets there, without waiting for it.

    Raises:
        ValueError: a label on the CPU is negative or not below `vocab_size`.
    """
    if labels.is_meta or not labels.numel():
        return
    low, high = labels.aminmax()
    if labels.is_cuda:
        torch._assert_async((low >= 0) & (high < vocab_size), "a label outside the vocabulary")
    elif low < 0 or high >= vocab_size:
        raise ValueError(
            f"labels from {int(low)} to {int(high)} are not within a vocabulary of {vocab_size} "
            "ids; give token ids, and any id where the loss is masked"
        )


def gradient_tile(num_tokens: int, num_ids: int, chunk_tokens: int, weight_trained: bool) -> Tile:
    """Return the tile of a backward, which has the logits of `chunk_tokens` tokens at most.

    Every tile adds to the gradient of its tokens' hidden states and to that of its ids' weights.
    Both are read and written once for each tile that shares them, so their traffic is least in
    square tiles. A tile of all ids adds to the hidden states once: best where the weight is frozen.
    """
    elements = chunk_tokens * num_ids
    tokens = min(num_tokens, max(isqrt(elements), chunk_tokens) if weight_trained else chunk_tokens)
    ids = min(num_ids, elements // tokens)
    if COLUMN_MULTIPLE < ids < num_ids:
        ids -= ids % COLUMN_MULTIPLE
    return Tile(tokens, ids)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b [m, n] in `dtype`, which is at least as wide as theirs and is summed in."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    if a.is_cuda or a.is_meta:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, rounded once to its dtype; a 16-bit product is summed in fp32."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and total.dtype == torch.float32 and a.dtype != torch.float64:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(product(a, b, torch.promote_types(a.dtype, total.dtype)))


def _check_rows(logits: Tensor, **rows: Tensor) -> None:
    wrong = {name: tuple(x.shape) for name, x in rows.items() if x.shape != logits.shape[:1]}
    if wrong or logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(
            f"logits={tuple(logits.shape)} do not fit {wrong or 'a matrix'}; give [t, v] logits "
            "and one label, log-sum-exp and gradient per row"
        )
    if rows["labels"].dtype != torch.int64:
        raise ValueError(f"labels are {rows['labels'].dtype}; give int64")
    devices = {name: x.device for name, x in rows.items() if x.device != logits.device}
    if devices:
        raise ValueError(f"logits are on {logits.device}, but {devices}; move them to one device")
