"""Layout-free, durable, asynchronous checkpoints of a run: save, restore, retain."""

from ring_train.checkpoint.errors import CheckpointError
from ring_train.checkpoint.folders import find_checkpoint
from ring_train.checkpoint.state import TrainState

__all__ = ["CheckpointError", "TrainState", "find_checkpoint"]
