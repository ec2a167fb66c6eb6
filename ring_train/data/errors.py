"""The error of this package."""

from ring_train.errors import UserError


class DataError(UserError):
    """A shard on disk is missing, damaged, too short, or does not fit the model."""
