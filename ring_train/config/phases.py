"""Stretches of one run that differ in mixture, sizes or position embedding."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class BatchRampConfig:
    """A batch size that grows in equal increments up to the global batch size."""

    start: int
    """Rows of the first step."""
    increment: int
    """Rows added at a time."""
    steps: int
    """Steps at each size."""


@dataclass(kw_only=True)
class PhaseConfig:
    """One phase; null = what `train` and `model` say.

    Its length is given by `tokens`, an exact budget for each domain, by `num_steps` with `weights`,
    or by `num_epochs`, with which a weight is a factor on the passes over a domain.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of each domain; domains left out are not read."""
    num_steps: int | None = None
    num_epochs: float | None = None
    """Passes over the domains with a weight above 0."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the rows of each domain; empty = the weights in data.domains."""
    seq_length: int | None = None
    micro_batch_size: int | None = None
    global_batch_size: int | None = None
    batch_ramp: BatchRampConfig | None = None
    rotary_base: float | None = None
    rotary_scaling_factor: float | None = None
    """YaRN: how many times the original context is stretched."""
    moe_router_bias_update_rate: float | None = None
