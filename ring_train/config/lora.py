"""Low-rank adapters beside frozen weights."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class LoraConfig:
    """y = W x + alpha / rank * B (A x): A and B are trained, everything else is frozen."""

    rank: int | None = None
    """Rows of A; null = no adapters, all weights are trained."""
    alpha: float = 32.0
    """Adapters count alpha / rank times."""
    targets: list[str] = field(default_factory=list)
    """Projections that get an adapter in every layer that has them, see docs/lora.md."""
