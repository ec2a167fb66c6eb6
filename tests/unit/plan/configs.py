"""Configs that tests of the plan start from."""

from ring_train.config import Config, compose


def tiny(*words: str) -> Config:
    """Return a small legal run of the tiny model, changed by `key=value` words."""
    return compose("pretrain", ["model=tiny", "optim=short", "train=cpu", *words])
