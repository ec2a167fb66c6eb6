"""The error of this package."""

from ring_train.errors import UserError


class HfError(UserError):
    """A Hugging Face folder is not what it should be, or cannot say what a model is."""
