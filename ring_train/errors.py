"""The base class of every error that a person can cause and repair. Imports nothing."""


class UserError(ValueError):
    """A config, file or folder is wrong; the message says which value, why, and the way out.

    `ring_train.runtime.errors.run_job` prints the message alone and exits with status 2.
    """

    rank: int | None = None
    """Global rank that raised it, set by `start_runtime`; None before the runtime started."""
