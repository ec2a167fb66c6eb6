"""Where FP8 does not apply although a run has it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def without_fp8(block: Any) -> Iterator[None]:
    """The layers of a `TransformerBlock` compute in bf16 inside this context.

    megatron's block enters the FP8 context of each layer by its own config, which is another one
    here. For generation: FP8 takes rows of whole blocks only, and its copies of the weights are of
    the last training step, before the update.
    """
    config = block.config
    if config.fp8 is not None:
        block.config = copy.copy(config)
        block.config.fp8 = None
    try:
        yield
    finally:
        block.config = config
