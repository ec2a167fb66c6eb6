"""One optimizer step, normalised by counts of the global batch under every layout.

The loss of a micro batch is (sum over its tokens) / (count over the global batch), so gradients
are plain sums over micro batches and ranks: accumulation, data parallelism and padding cannot
change them. The same function serves evaluation and scoring.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection

from ring_train.data.batch import Batch
from ring_train.model.router import RouterLoad, begin_router_step, finish_router_step
from ring_train.plan import Plan
from ring_train.plan.context import own_tokens
from ring_train.train.optimizer import set_learning_rate
from ring_train.train.schedule import learning_rate


@dataclass(frozen=True)
class LossSums:
    """Sums over the tokens of the global batch; equal on every rank. fp64, nats and tokens."""

    domain_loss: torch.Tensor
    """[n_domains] summed next-token loss per domain."""
    domain_tokens: torch.Tensor
    """[n_domains] trained tokens per domain."""
    mtp_loss: torch.Tensor
    """[depths] summed loss per MTP depth."""
    mtp_tokens: torch.Tensor
    """[depths] trained tokens per MTP depth."""

    @property
    def lm_loss(self) -> torch.Tensor:
        """Mean next-token loss in nats."""
        return self.domain_loss.sum() / self.domain_tokens.sum()

    def domain_means(self) -> torch.Tensor:
        """Mean loss per domain in nats; NaN where a domain has no token."""
        return self.domain_loss / self.domain_tokens

    def mtp_means(self) -> torch.Tensor:
        """Mean loss per MTP depth in nats."""
        return self.mtp_loss / self.mtp_tokens


@dataclass(frozen=True)
class StepResult:
    """What one training step reports; tensors stay on the device until they are logged."""

    sums: LossSums
    grad_norm: float
    """L2 norm of all gradients before clipping."""
    learning_rate: float
    loads: dict[int, RouterLoad]
    """{layer number: expert load} of this pipeline stage; MTP depths count on from L + 1."""


def context_parts(batches: Sequence[Batch], groups: ProcessGroupCollection) -> Sequence[Batch]:
    """Return what this context-parallel rank holds of each row: the one place that cuts rows."""
    cp, rank = groups.cp.size(), groups.cp.rank()
    if cp == 1:
        return batches
    return [batch.part(own_tokens(len(batch.tokens), cp, rank)) for batch in batches]


def global_counts(
    micro_batches: Sequence[Batch], groups: ProcessGroupCollection
) -> tuple[torch.Tensor, int]:
    """Return ([1 + depths] fp64 trained tokens per loss, non-padding tokens) of the global batch.

    Collective over data x context parallel ranks.
    """
    rows = [
        torch.stack(
            [
                batch.loss_mask.sum(),
                *batch.mtp_loss_mask.sum(1),
                torch.tensor(len(batch.tokens) - batch.num_padding, device=batch.tokens.device),
            ]
        )
        for batch in micro_batches
    ]
    counts = torch.stack(rows).sum(0).double()
    torch.distributed.all_reduce(counts, group=groups.dp_cp)
    return counts[:-1], int(counts[-1])


def forward_backward(
    model: list[DistributedDataParallel],
    micro_batches: Sequence[Batch],
    groups: ProcessGroupCollection,
    *,
    num_domains: int,
    loss_weights: Sequence[float] | None,
    before_each: Callable[[], None] = lambda: None,
) -> LossSums:
    """Run all micro batches; with `loss_weights`, leave reduced gradients in `main_grad`.

    Args:
        model: model chunks of this rank.
        micro_batches: this data-parallel rank's part of the global batch, all of one length;
            whole rows, also under context parallelism.
        groups: process groups.
        num_domains: size of the per-domain sums.
        loss_weights: weight of the next-token loss and of each MTP depth; None: forward only.
        before_each: called before the forward of each micro batch; what it raises ends the step.
    """
    seq_length = len(micro_batches[0].tokens)
    micro_batches = context_parts(micro_batches, groups)
    counts, tokens = global_counts(micro_batches, groups)
    begin_router_step(model, tokens)
    weights = torch.tensor(loss_weights or [0.0] * len(counts), dtype=torch.float64)
    scale = (weights.to(counts.device) / counts.clamp(min=1)).to(torch.float64)

    def forward_step(batches: Iterator[Batch], chunk: torch.nn.Module):
        before_each()
        batch = next(batches)
        return chunk(batch), partial(_loss, batch=batch, scale=scale, num_domains=num_domains)

    iterators = [iter(micro_batches) for _ in model]
    chunks: list[torch.nn.Module] = [*model]
    single = len(model) == 1
    forward_only = loss_weights is None
    with torch.set_grad_enabled(not forward_only):  # megatron's forward_only records a graph
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators[0] if single else iterators,
            model=chunks[0] if single else chunks,
            num_microbatches=len(micro_batches),
            seq_length=seq_length,
            micro_batch_size=1,
            forward_only=forward_only,
        )
    return _reduce(reports, num_domains, len(counts) - 1, groups, counts.device)


def _loss(
    losses: torch.Tensor, *, batch: Batch, scale: torch.Tensor, num_domains: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (scaled loss, 1, report) of one micro batch from its losses [1 + depths, t]."""
    masks = torch.cat([batch.loss_mask[None], batch.mtp_loss_mask])  # [1 + depths, t]
    masked = torch.where(masks, losses, torch.zeros_like(losses))
    total = (masked.sum(1) * scale.to(losses.dtype)).sum()
    detached = masked.detach().double()
    domains = batch.domains.long()
    by_domain = detached.new_zeros(2, num_domains)
    by_domain[0].index_add_(0, domains, detached[0])
    by_domain[1].index_add_(0, domains, masks[0].double())
    report = torch.cat([by_domain.flatten(), detached[1:].sum(1), masks[1:].sum(1).double()])
    return total, torch.ones((), dtype=torch.int), report


def _reduce(
    reports: list[torch.Tensor],
    num_domains: int,
    depths: int,
    groups: ProcessGroupCollection,
    device: torch.device,
) -> LossSums:
    """Sum the reports of the last stage over micro batches and ranks; broadcast to all stages."""
    size = 2 * num_domains + 2 * depths
    is_last = groups.pp.rank() == groups.pp.size() - 1
    total = torch.zeros(size, dtype=torch.float64, device=device)
    if is_last:
        total += torch.stack(reports).sum(0)
        torch.distributed.all_reduce(total, group=groups.dp_cp)
    if groups.pp.size() > 1:
        last = torch.distributed.get_process_group_ranks(groups.pp)[-1]
        torch.distributed.broadcast(total, src=last, group=groups.pp)
    split = [num_domains, num_domains, depths, depths]
    return LossSums(*total.split(split))


def compute_gradients(
    plan: Plan,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    micro_batches: Sequence[Batch],
    groups: ProcessGroupCollection,
    *,
    num_domains: int,
    before_each: Callable[[], None] = lambda: None,
) -> LossSums:
    """Leave the reduced gradients of one step in the buffers; return its sums.

    Nothing that a run consists of changes, so it can be called again.

    Args:
        plan: weights of the losses.
        model: model chunks of this rank.
        optimizer: forgets the gradients of before.
        micro_batches: see `forward_backward`.
        groups: process groups.
        num_domains: size of the per-domain sums.
        before_each: see `forward_backward`.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    depths = plan.layers.num_mtp
    factor = plan.config.model.mtp_loss_scaling_factor
    return forward_backward(
        model,
        micro_batches,
        groups,
        num_domains=num_domains,
        loss_weights=[1.0, *[factor / depths] * depths] if depths else [1.0],
        before_each=before_each,
    )


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Return the L2 norm of all gradients before clipping; `apply_gradients` may follow.

    Collective over the ranks that share the norm.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm() or 0.0)


def apply_gradients(
    plan: Plan,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
    *,
    step: int,
    sums: LossSums,
) -> StepResult:
    """Update weights and routers by the gradients of a step (0-based); return its figures."""
    lr = learning_rate(plan.config.optim, step, plan.config.train.num_steps)
    set_learning_rate(optimizer, lr, plan.config.optim.weight_decay)
    outcome: Any = optimizer.step()  # megatron's base class declares None
    _, grad_norm, _ = outcome
    loads = finish_router_step(model, groups, plan.at(step).phase.moe_router_bias_update_rate)
    return StepResult(sums, float(grad_norm or 0.0), lr, loads)


def train_step(
    plan: Plan,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    micro_batches: Sequence[Batch],
    groups: ProcessGroupCollection,
    *,
    step: int,
    num_domains: int,
) -> StepResult:
    """Run one optimizer step (0-based `step`) and the expert-bias update; return its figures."""
    sums = compute_gradients(plan, model, optimizer, micro_batches, groups, num_domains=num_domains)
    return apply_gradients(plan, model, optimizer, groups, step=step, sums=sums)
