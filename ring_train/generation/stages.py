"""A row through the pipeline stages of a replica, and what its sampler chose on all its ranks.

No schedule of megatron-core is involved: there is one row at a time and no backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel

from ring_train.generation.rows import Row
from ring_train.model.language_model import HybridLanguageModel
from ring_train.runtime.distributed import Groups


def run_stages(
    model: Sequence[DistributedDataParallel], groups: Groups, row: Row
) -> torch.Tensor | None:
    """Return the hidden states [t/sp, 1, h] of a row on the ranks of the last stage, else None.

    Collective over the replica's tensor- and pipeline-parallel ranks, and over expert-parallel
    ones. Virtual stages run in order of depth.
    """
    pp = groups.collection.pp
    num_stages = len(model) * pp.size()
    hidden = None
    for number, wrapped in enumerate(model):
        chunk = wrapped.module
        assert isinstance(chunk, HybridLanguageModel)
        stage = number * pp.size() + pp.rank()
        if stage > 0:
            hidden = _empty_hidden(chunk, row)
            dist.recv(hidden, group=pp, group_src=(stage - 1) % pp.size())
            chunk.set_input_tensor(hidden)
        hidden = chunk.hidden_states(row.tokens, chunk.layer_inputs(row, row.documents))
        if stage < num_stages - 1:
            dist.send(hidden.contiguous(), group=pp, group_dst=(stage + 1) % pp.size())
            hidden = None
    return hidden


def _empty_hidden(chunk: HybridLanguageModel, row: Row) -> torch.Tensor:
    """Return room for the hidden states of the stage before: [t/sp, 1, h]."""
    config = chunk.config
    shards = chunk.groups.tp.size() if config.sequence_parallel else 1
    shape = len(row.tokens) // shards, 1, config.hidden_size
    return torch.empty(shape, dtype=config.params_dtype, device=row.tokens.device)


def is_sampler(groups: Groups) -> bool:
    """Return whether this rank chooses the tokens of its replica."""
    return groups.is_last_stage and groups.tp_rank == 0


def broadcast_from_sampler(values: torch.Tensor, groups: Groups) -> None:
    """Write the sampler's values on every rank of its replica. Collective over tp x pp ranks."""
    replica = groups.collection.mp
    if replica.size() > 1:
        # Ranks of the group are in order of stages, tensor-parallel ranks of a stage side by side.
        sampler = replica.size() - groups.collection.tp.size()
        dist.broadcast(values, group=replica, group_src=sampler)
