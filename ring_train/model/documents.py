"""Document boundaries of one packed row, in the form megatron-core passes through its layers.

Every mixer of this project receives a `Documents`: there is no forward without boundaries, so no
state, attention or position can leak from one document into the next by omission.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from ring_train.plan.context import ContextRow, make_context_row


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Documents of a row that are kept: what they leave behind goes into the caches.

    Several sequences may continue one document; each has a slot of its own.
    """

    first_slot: int
    """The sequences go to the slots from here on."""
    sources: torch.Tensor
    """[sequences] int64, the document of each."""
    tokens: torch.Tensor
    """[positions of all sequences] int64: the token of the documents (counted from the first
    document's first) that lies at each position of each sequence."""
    slots: torch.Tensor
    """[positions of all sequences] int64, the slot of each."""
    positions: torch.Tensor
    """[positions of all sequences] int64, from 0 in every sequence."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """What a row of generation carries beside documents.

    The row begins with one token for each of the sequences in the slots 0 to n - 1, which goes on
    where the caches end; documents follow.
    """

    caches: Mapping[int, Any]
    """{layer number, 1-based and global: cache of the layer's mixer}."""
    num_sequences: int
    """n; 0 if the row has documents only."""
    lengths: torch.Tensor
    """[n] int64: tokens of each sequence before this one."""
    longest: int
    """Their maximum on the host; 0 for n = 0."""
    admission: Admission | None
    """Which documents are kept; None for none."""


@dataclass
class Documents(PackedSeqParams):
    """megatron's `PackedSeqParams` (format `thd`) plus the lengths as Python integers.

    The boundaries are those of the tokens that this rank holds: under context parallelism a
    document that is cut is one piece in each segment. The host copy of the lengths spares a device
    synchronisation per layer.
    """

    lengths: tuple[int, ...] = ()
    """Tokens of each document (or piece), in order; they sum to the tokens of this rank, less the
    first `decoding.num_sequences` of a row of generation."""
    context: ContextRow | None = None
    """How the pieces hang together; None without context parallelism."""
    decoding: Decoding | None = None
    """The caches of generation; None in training."""


def make_documents(cu_seqlens: torch.Tensor, cp: int = 1, cp_rank: int = 0) -> Documents:
    """Return the `Documents` of a row.

    Args:
        cu_seqlens: [n_docs + 1] int32: 0, then the end of every document of the whole row.
        cp: context-parallel degree.
        cp_rank: context-parallel rank.
    """
    boundaries = cu_seqlens.tolist()
    context = make_context_row(boundaries, cp, cp_rank) if cp > 1 else None
    if context is None:
        lengths = tuple(end - start for start, end in itertools.pairwise(boundaries))
    else:
        lengths = context.lengths
        cu_seqlens = cu_seqlens.new_tensor([0, *itertools.accumulate(lengths)])
    return Documents(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
        context=context,
    )


def make_generation_documents(
    lengths: Sequence[int], decoding: Decoding, device: torch.device
) -> Documents:
    """Return the `Documents` of a row of generation; `lengths` are those after its sequences."""
    boundaries = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    longest = max(lengths, default=1)
    return Documents(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=tuple(lengths),
        decoding=decoding,
    )
