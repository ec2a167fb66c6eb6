"""Document boundaries of one packed row, in the form megatron-core passes through its layers.

Every mixer of this project receives a `Documents`: there is no forward without boundaries, so no
state, attention or position can leak from one document into the next by omission.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class Documents(PackedSeqParams):
    """megatron's `PackedSeqParams` (format `thd`) plus the lengths as Python integers.

    The host copy of the lengths spares a device synchronisation per layer.
    """

    lengths: tuple[int, ...] = ()
    """Tokens of each document, in order; they sum to the length of the row."""


def make_documents(cu_seqlens: torch.Tensor) -> Documents:
    """Return the `Documents` of a row.

    Args:
        cu_seqlens: [n_docs + 1] int32 on the host: 0, then the end of every document.
    """
    boundaries = cu_seqlens.tolist()
    lengths = tuple(end - start for start, end in itertools.pairwise(boundaries))
    return Documents(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
    )
