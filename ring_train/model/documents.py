"""Document boundaries of one packed row, in the form megatron-core passes through its layers.

Every mixer of this project receives a `Documents`: there is no forward without boundaries, so no
state, attention or position can leak from one document into the next by omission.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from ring_train.plan.context import ContextRow, make_context_row


@dataclass
class Documents(PackedSeqParams):
    """megatron's `PackedSeqParams` (format `thd`) plus the lengths as Python integers.

    The boundaries are those of the tokens that this rank holds: under context parallelism a
    document that is cut is one piece in each segment. The host copy of the lengths spares a device
    synchronisation per layer.
    """

    lengths: tuple[int, ...] = ()
    """Tokens of each document (or piece), in order; they sum to the tokens of this rank."""
    context: ContextRow | None = None
    """How the pieces hang together; None without context parallelism."""


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
