"""A step of generation as tensors on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ring_train.generation.slots import Step
from ring_train.model.decoding import Cache
from ring_train.model.documents import (
    Admission,
    Decoding,
    Documents,
    make_generation_documents,
)


@dataclass(kw_only=True)
class Row:
    """One row of t tokens."""

    tokens: torch.Tensor
    """[t] int64"""
    position_ids: torch.Tensor
    """[t] int64"""
    padding_mask: torch.Tensor
    """[t] bool"""
    num_padding: int
    """How many of them are True, at the end."""
    documents: Documents
    """Boundaries, and the caches of the sequences."""
    outputs: torch.Tensor
    """[sequences] int64, see `Step.outputs`."""


def make_row(step: Step, caches: Mapping[int, Cache], device: torch.device) -> Row:
    """Return a step on the device, with the caches that its layers read and write."""
    decoding = Decoding(
        caches=caches,
        num_sequences=step.num_sequences,
        lengths=torch.from_numpy(step.lengths).to(device),
        longest=int(step.lengths.max(initial=0)),
        admission=_admission(step, device) if len(step.sources) else None,
    )
    t = len(step.tokens)
    return Row(
        tokens=torch.from_numpy(step.tokens).to(device),
        position_ids=torch.from_numpy(step.position_ids).to(device),
        padding_mask=torch.arange(t, device=device) >= t - step.num_padding,
        num_padding=step.num_padding,
        documents=make_generation_documents(step.documents, decoding, device),
        outputs=torch.from_numpy(step.outputs).to(device),
    )


def _admission(step: Step, device: torch.device) -> Admission:
    sizes = np.array(step.documents, dtype=np.int64)
    own = sizes[step.sources]  # [admitted] tokens of each sequence
    ends = np.cumsum(own)
    positions = np.arange(ends[-1]) - np.repeat(ends - own, own)
    starts = (np.cumsum(sizes) - sizes)[step.sources]
    first = step.num_sequences
    slots = np.repeat(np.arange(first, first + len(own)), own)
    return Admission(
        first_slot=first,
        sources=torch.from_numpy(step.sources).to(device),
        tokens=torch.from_numpy(np.repeat(starts, own) + positions).to(device),
        slots=torch.from_numpy(slots).to(device),
        positions=torch.from_numpy(positions).to(device),
    )
