"""The error of this package."""

from ring_train.errors import UserError


class CheckpointError(UserError):
    """A checkpoint on disk is missing, damaged or of another model, or cannot be written."""


class DamagedCheckpoint(CheckpointError):
    """Files of a checkpoint are not what was written; the one before may be whole."""
