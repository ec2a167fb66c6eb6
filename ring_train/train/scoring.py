"""Log-probabilities and gradients of given token ids, under any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from ring_train.data.batch import Batch, pack_documents
from ring_train.model.router import begin_router_step
from ring_train.model.tensors import local_tensors
from ring_train.plan import Plan
from ring_train.plan.context import own_tokens
from ring_train.runtime.distributed import Groups
from ring_train.train.step import LossSums, context_parts, forward_backward


def make_rows(
    plan: Plan, prompts: Sequence[Sequence[int]], dp_rank: int, *, packed: bool
) -> list[Batch]:
    """Return the rows of one data-parallel rank, all of the plan's length.

    Prompt i is row i // dp of rank i % dp; ranks that run out of prompts get a row without
    targets, because expert parallelism needs every rank in every forward.
    """
    groups = [list(prompts)] if packed else [[prompt] for prompt in prompts]
    dp = plan.mesh.dp
    rows = []
    for index in range(plan.batch.num_micro_batches):
        number = index * dp + dp_rank
        documents = groups[number] if number < len(groups) else [[0]]
        row = pack_documents(
            documents, num_mtp=plan.layers.num_mtp, pad_to_multiple=plan.batch.seq_length
        )
        rows.append(row)
    return rows


def score_rows(
    model: list[DistributedDataParallel],
    rows: Sequence[Batch],
    prompts: Sequence[Sequence[int]],
    groups: Groups,
    *,
    packed: bool,
) -> dict[str, list[list[float]]]:
    """Return {"logprobs": per prompt, "mtp_logprobs": ..., "mtp_logprobs_2": ...} on every rank.

    Entry t of a prompt is log p(ids[t + 1 + depth] | ids[0 .. t + depth]).
    """
    losses = token_losses(model, [row.to(groups.device) for row in rows], groups.collection)
    mine = (groups.dp_rank, losses) if losses and groups.tp_rank == groups.cp_rank == 0 else None
    gathered: list[tuple[int, list[torch.Tensor]] | None] = [None] * groups.world_size
    torch.distributed.all_gather_object(gathered, mine)
    by_rank = dict(part for part in gathered if part is not None)
    result: dict[str, list[list[float]]] = {}
    start = 0
    for index, prompt in enumerate(prompts):
        number = 0 if packed else index
        row = by_rank[number % len(by_rank)][number // len(by_rank)]  # [1 + depths, t]
        for depth in range(len(row)):
            key = ("logprobs", "mtp_logprobs")[depth] if depth < 2 else f"mtp_logprobs_{depth}"
            targets = max(len(prompt) - 1 - depth, 0)
            scores = -row[depth, start : start + targets]
            result.setdefault(key, []).append(scores.tolist())
        start += len(prompt) if packed else 0
    return result


@torch.no_grad()
def token_losses(
    model: list[DistributedDataParallel], rows: Sequence[Batch], groups: ProcessGroupCollection
) -> list[torch.Tensor]:
    """Return the losses [1 + depths, t] fp32 of each row of this data-parallel rank.

    On the last pipeline stage; other stages return an empty list. Collective.
    """
    for chunk in model:
        chunk.eval()
    begin_router_step(model, 1)
    parts = context_parts(rows, groups)
    iterators = [iter(parts) for _ in model]
    chunks: list[torch.nn.Module] = [*model]
    single = len(model) == 1
    losses = get_forward_backward_func()(
        forward_step_func=lambda batches, chunk: (chunk(next(batches)), _keep),
        data_iterator=iterators[0] if single else iterators,
        model=chunks[0] if single else chunks,
        num_microbatches=len(rows),
        seq_length=len(rows[0].tokens),
        micro_batch_size=1,
        forward_only=True,
    )
    for chunk in model:
        chunk.train()
    if groups.pp.rank() != groups.pp.size() - 1:
        return []
    return [_whole_row(part, groups.cp).cpu() for part in losses]


def _whole_row(part: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Return [..., t] of the row from what every context-parallel rank holds of it. Collective."""
    cp = group.size()
    if cp == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(cp)]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    whole = part.new_empty(*part.shape[:-1], cp * part.shape[-1])
    for rank, values in enumerate(parts):
        ranges = own_tokens(whole.shape[-1], cp, rank)
        for (start, stop), segment in zip(ranges, values.chunk(len(ranges), -1), strict=True):
            whole[..., start:stop] = segment
    return whole


def _keep(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the losses as the report of a micro batch, in the form that schedules expect."""
    return losses.sum(), torch.ones((), dtype=torch.int), losses.detach()


def gradient_norms(
    model: list[DistributedDataParallel],
    rows: Sequence[Batch],
    groups: ProcessGroupCollection,
    *,
    loss_weights: Sequence[float],
    to_named: Callable[[str, torch.Tensor], dict[str, torch.Tensor]],
) -> tuple[LossSums, dict[str, float]]:
    """Return the losses and the L2 norm of every gradient by exported name, on every rank.

    Parameters that no weighted loss reaches are absent. Collective over all ranks.

    Args:
        model: model chunks, without an optimizer.
        rows: micro batches of this data-parallel rank.
        groups: process groups.
        loss_weights: weight of the next-token loss and of each MTP depth.
        to_named: (logical name, full tensor) -> tensors by exported name; linear.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    sums = forward_backward(model, rows, groups, num_domains=1, loss_weights=loss_weights)
    depths = max((i for i, weight in enumerate(loss_weights) if weight), default=0)
    norms: dict[str, float] = {}
    for item in local_tensors(model):
        reached = _mtp_depth(item.name) <= depths
        if item.is_copy or not item.is_parameter or not reached:
            continue
        full = item.shard.gather(item.gradient)
        norms |= {name: float(grad.norm()) for name, grad in to_named(item.name, full).items()}
    gathered: list[dict[str, float]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, norms)
    return sums, {name: norm for part in gathered for name, norm in part.items()}


def _mtp_depth(name: str) -> int:
    """Return 0 for the trunk, k for depth k (1-based)."""
    return int(name.split(".")[2]) + 1 if name.startswith("mtp.layers.") else 0
