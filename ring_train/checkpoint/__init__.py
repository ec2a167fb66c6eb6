"""Layout-free, durable, asynchronous checkpoints of a run: save, restore, retain."""

import ring_train.platform  # noqa: F401  (must come before the first import of megatron.core)
from ring_train.checkpoint.checkpointer import Checkpointer, load_weights
from ring_train.checkpoint.errors import CheckpointError
from ring_train.checkpoint.folders import find_checkpoint
from ring_train.checkpoint.state import TrainState

__all__ = ["CheckpointError", "Checkpointer", "TrainState", "find_checkpoint", "load_weights"]
