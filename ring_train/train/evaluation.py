"""Validation loss per domain on the held-out split."""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.distributed import DistributedDataParallel

from ring_train.data.loader import Batches, HeldOut
from ring_train.runtime.distributed import Groups
from ring_train.train.step import forward_backward


def evaluate(
    model: list[DistributedDataParallel],
    batches: Batches | HeldOut,
    groups: Groups,
    step: int,
    before_each: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Return {"valid_loss/<domain>": nats per token} over the validation rows of each domain.

    The rows are the same at every call in a phase, which `step` decides. Router counts and biases
    do not change. What `before_each` raises before a domain ends it, and nothing has changed.
    """
    for chunk in model:
        chunk.eval()
    losses = {}
    try:
        for index, domain in enumerate(batches.domains):
            before_each()
            rows = [
                row.to(groups.device) for row in batches.validation(domain, groups.dp_rank, step)
            ]
            if rows:
                sums = forward_backward(
                    model,
                    rows,
                    groups.collection,
                    num_domains=len(batches.domains),
                    loss_weights=None,
                )
                losses[f"valid_loss/{domain}"] = float(sums.domain_means()[index])
    finally:
        for chunk in model:
            chunk.train()
    return losses
