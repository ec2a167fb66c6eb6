"""What the model reads."""

from dataclasses import dataclass, field


@dataclass(kw_only=True)
class DomainConfig:
    """One named source of tokens."""

    path: str
    """Prefix of the training .bin/.idx pair."""
    valid_path: str | None = None
    """Prefix of the held-out pair; null = not evaluated."""
    weight: float = 1.0
    """Share of training samples, relative to the sum of all weights."""


@dataclass(kw_only=True)
class DataConfig:
    """The mixture of domains and its tokenizer."""

    domains: dict[str, DomainConfig] = field(default_factory=dict)
    tokenizer: str = ""
    """Folder of a Hugging Face tokenizer."""
    document_isolation: bool = True
    """Documents packed into one row do not see each other."""
