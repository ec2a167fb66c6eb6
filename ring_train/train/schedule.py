"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from ring_train.config import LrDecayStyle, OptimConfig


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of a step (0-based).

    Linear warm-up over `lr_warmup_steps`, then constant, a cosine to `min_lr` at the last step, or
    WSD: constant, then linear to `min_lr` over the last `wsd_decay_steps`.
    """
    if step < optim.lr_warmup_steps:
        return optim.lr * (step + 1) / optim.lr_warmup_steps
    if optim.lr_decay_style is LrDecayStyle.constant:
        return optim.lr
    if optim.lr_decay_style is LrDecayStyle.cosine:
        span = max(num_steps - optim.lr_warmup_steps, 1)
        fraction = min((step - optim.lr_warmup_steps + 1) / span, 1.0)
        return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * fraction))
    if not optim.wsd_decay_steps:
        return optim.lr
    remaining = num_steps - step - 1
    fraction = min(max(remaining / optim.wsd_decay_steps, 0.0), 1.0)
    return optim.min_lr + (optim.lr - optim.min_lr) * fraction
