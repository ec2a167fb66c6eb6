"""Batched generation in the trainer's own model, under the layout in which it trains."""

import ring_train.platform  # noqa: F401  (must come before the first import of megatron.core)

# isort: split

from ring_train.generation.answers import Answer
from ring_train.generation.generator import Generator
from ring_train.generation.sampling import Sampling

__all__ = ["Answer", "Generator", "Sampling"]
