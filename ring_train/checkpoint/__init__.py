"""Checkpoints of a run in megatron's torch_dist format: save, restore, retain."""

import ring_train.platform  # noqa: F401  (must come before the first import of megatron.core)
from ring_train.checkpoint.checkpointer import Checkpointer, TrainState, load_weights
from ring_train.checkpoint.errors import CheckpointError

__all__ = ["CheckpointError", "Checkpointer", "TrainState", "load_weights"]
