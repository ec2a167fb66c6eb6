"""The error of this package."""

from ring_train.errors import UserError


class CheckpointError(UserError):
    """A checkpoint on disk is missing, incomplete or of another model."""
