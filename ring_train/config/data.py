"""What the model reads."""

from dataclasses import dataclass, field

from ring_train.config.choices import Packing


@dataclass(kw_only=True)
class DomainConfig:
    """One named source of tokens."""

    path: str
    """Prefix of the training .bin/.idx pair."""
    valid_path: str | None = None
    """Prefix of the held-out pair; null = not evaluated."""
    weight: float = 1.0
    """Share of training samples, relative to the sum of all weights."""
    max_epochs: float | None = None
    """More passes over the domain in one run are refused; null = no limit."""
    max_tokens: int | None = None
    """More tokens of the domain in one run are refused; null = no limit."""
    min_document_tokens: int = 0
    """Shorter documents are left out."""
    max_document_tokens: int | None = None
    """Longer documents are left out; null = none."""


@dataclass(kw_only=True)
class DataConfig:
    """The mixture of domains and its tokenizer."""

    domains: dict[str, DomainConfig] = field(default_factory=dict)
    tokenizer: str = ""
    """Folder of a Hugging Face tokenizer."""
    document_isolation: bool = True
    """Documents packed into one row do not see each other."""
    packing: Packing = Packing.contiguous
    index_dir: str | None = None
    """Where document orders and schedules are built once and mapped; null = RUN_DIR/index."""
