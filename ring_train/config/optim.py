"""AdamW and the learning-rate schedule."""

from dataclasses import dataclass

from ring_train.config.choices import LrDecayStyle


@dataclass(kw_only=True)
class OptimConfig:
    """Optimizer constants; the schedule ends with the last training step."""

    lr: float
    """Peak learning rate."""
    min_lr: float
    """Learning rate of the last step, unless the schedule is constant."""
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    clip_grad: float
    """Largest global gradient norm; 0 = no clipping."""
    lr_decay_style: LrDecayStyle
    lr_warmup_steps: int
    lr_warmup_fraction: float | None = None
    """Share of all steps, instead of lr_warmup_steps; null = count the steps."""
    wsd_decay_steps: int = 0
    """Steps of the final linear anneal of the wsd schedule."""
