"""The error of this package."""

from ring_train.errors import UserError


class StorageError(UserError):
    """A file is not what its format says."""
