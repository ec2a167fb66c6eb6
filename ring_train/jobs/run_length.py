"""The length of a run that is given in epochs."""

import os

from ring_train.config import Config
from ring_train.runtime.logs import start_logs


def with_num_steps(config: Config) -> Config:
    """Return the config with epochs counted in steps; without epochs, no shard is needed.

    Raises:
        DataError: see `ring_train.data.epochs.count_epochs`.
    """
    given = [config.train.num_epochs, *(phase.num_epochs for phase in config.phases.values())]
    if all(epochs is None for epochs in given):
        return config
    from ring_train.data.epochs import count_epochs  # imports torch

    start_logs(int(os.environ.get("RANK", "0")))
    return count_epochs(config)
