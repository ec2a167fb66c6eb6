"""What a run trains, on what, and where it is kept."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from ring_train.checkpoint.checkpointer import Checkpointer
from ring_train.data.loader import Batches
from ring_train.train.answers import AnswerEvaluation


@dataclass(frozen=True)
class Components:
    """Everything that was built for a run."""

    model: list[DistributedDataParallel]
    """Wrapped model chunks of this rank."""
    optimizer: MegatronOptimizer
    """Megatron's, over them."""
    batches: Batches
    checkpoints: Checkpointer
    answers: AnswerEvaluation | None = None
    """The evaluation by generated answers; None = there is none."""
