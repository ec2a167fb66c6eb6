"""The error of this package."""

from ring_train.errors import UserError


class CheckpointError(UserError):
    """A checkpoint on disk is missing, damaged or of another model, or cannot be written."""
