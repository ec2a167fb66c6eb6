"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from ring_train.config import LrDecayStyle, OptimConfig
from ring_train.plan.schedule import warmup_steps


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of a step (0-based).

    Linear warm-up, then constant, a cosine or a line to `min_lr` at the last step, or WSD:
    constant, then linear to `min_lr` over the last `wsd_decay_steps`.
    """
    warmup = warmup_steps(optim, num_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.lr_decay_style is LrDecayStyle.constant:
        return optim.lr
    if optim.lr_decay_style is LrDecayStyle.wsd:
        return _wsd(optim, num_steps - step - 1)
    span = max(num_steps - warmup, 1)
    fraction = min((step - warmup + 1) / span, 1.0)
    height = 1 - fraction
    if optim.lr_decay_style is LrDecayStyle.cosine:
        height = 0.5 * (1 + math.cos(math.pi * fraction))
    return optim.min_lr + (optim.lr - optim.min_lr) * height


def _wsd(optim: OptimConfig, remaining: int) -> float:
    """Return the rate with `remaining` steps to come."""
    if not optim.wsd_decay_steps:
        return optim.lr
    fraction = min(max(remaining / optim.wsd_decay_steps, 0.0), 1.0)
    return optim.min_lr + (optim.lr - optim.min_lr) * fraction
