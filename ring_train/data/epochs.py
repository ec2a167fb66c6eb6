"""Epochs turned into steps: the one number of a run that only its data knows.

A run may be given as passes over its domains. What follows - steps, and rows of each domain - is
written into the config before it is planned, so that a recorded run needs no shard to be planned.
"""

from __future__ import annotations

import dataclasses
import logging
from math import ceil, isfinite

from ring_train.config import Config, PhaseConfig
from ring_train.config.keys import nearest
from ring_train.data.errors import DataError
from ring_train.data.loader import open_streams
from ring_train.plan.phases import ONLY_PHASE, Sizes, phase_sizes

logger = logging.getLogger(__name__)

MAX_EPOCHS = 1_000_000


def count_epochs(config: Config) -> Config:
    """Return the config, which has epochs, with steps and rows of each domain in their place.

    Each domain gives its rows times the epochs times its weight, rounded to whole rows; the last
    step is filled from the next pass. Packings that are not in the index folder yet are built.

    Raises:
        DataError: epochs beside another length, epochs that are not positive, or shards that
            `build_batches` would refuse.
    """
    problems = epoch_problems(config)
    if problems:
        raise DataError("\n".join(problems))
    phases = {
        sizes.name: _counted(config, sizes, phase)
        for sizes, phase in zip(phase_sizes(config), _phases(config).values(), strict=True)
    }
    num_steps = config.train.num_steps
    if all(phase.num_steps for phase in phases.values()):
        num_steps = sum(phase.num_steps or 0 for phase in phases.values())
    train = dataclasses.replace(config.train, num_steps=num_steps, num_epochs=None)
    return dataclasses.replace(config, train=train, phases=phases)


def epoch_problems(config: Config) -> list[str]:
    """Return what is wrong with how epochs are given."""
    problems = []
    train = config.train
    if train.num_epochs is not None:
        if config.phases:
            problems.append(
                f"train.num_epochs={train.num_epochs} does not say which of the phases "
                f"{', '.join(config.phases)} it is for; set phases.NAME.num_epochs"
            )
        if train.num_steps:
            problems.append(
                f"train.num_epochs={train.num_epochs} and train.num_steps={train.num_steps} both "
                "give the length of the run; set train.num_steps=0 or train.num_epochs=null"
            )
    given = [phase.num_epochs for phase in config.phases.values()]
    if given and None not in given and train.num_steps:
        problems.append(
            f"train.num_steps={train.num_steps}, but the epochs of the phases give the length; set "
            "train.num_steps=0 (train.stop_after_step ends a run early)"
        )
    for name, phase in _phases(config).items():
        path = f"phases.{name}" if config.phases else "train"
        epochs = phase.num_epochs
        if epochs is None:
            continue
        if not 0 < epochs <= MAX_EPOCHS:
            problems.append(
                f"{path}.num_epochs={epochs} is not above 0 and at most {MAX_EPOCHS}; choose e.g. 3"
            )
        problems += _weight_problems(config, path, phase)
        for key in ("tokens", "num_steps", "batch_ramp"):
            if getattr(phase, key):
                problems.append(
                    f"{path}.num_epochs={epochs} and {path}.{key} exclude each other; remove one"
                )
    return problems


def _weight_problems(config: Config, path: str, phase: PhaseConfig) -> list[str]:
    """Return which weights of a phase, or of the domains if it has none, are no factors."""
    weights = {f"{path}.weights.{name}": weight for name, weight in phase.weights.items()}
    if not weights:
        domains = config.data.domains.items()
        weights = {f"data.domains.{name}.weight": domain.weight for name, domain in domains}
    return [
        f"{key}={weight} is not 0 or more; a weight is a factor on the passes"
        for key, weight in weights.items()
        if not (weight >= 0 and isfinite(weight))
    ]


def _phases(config: Config) -> dict[str, PhaseConfig]:
    """Return the phases as they were given."""
    only = PhaseConfig(num_epochs=config.train.num_epochs)
    return config.phases or {ONLY_PHASE: only}


def _counted(config: Config, sizes: Sizes, phase: PhaseConfig) -> PhaseConfig:
    """Return a phase whose length is given in steps."""
    if phase.num_epochs is None:
        return phase
    rows = _rows(config, sizes, phase.num_epochs)
    total = sum(rows.values())
    num_steps = ceil(total / sizes.global_batch_size)
    logger.info(
        "phase %s: %g epochs of %s = %d rows in %d steps",
        *(sizes.name, phase.num_epochs),
        *(", ".join(f"{name} ({count} rows)" for name, count in rows.items()), total, num_steps),
    )
    return dataclasses.replace(
        phase,
        num_epochs=None,
        num_steps=num_steps,
        weights={name: float(count) for name, count in rows.items()},
    )


def _rows(config: Config, sizes: Sizes, epochs: float) -> dict[str, int]:
    """Return the rows that a phase reads of each of its domains."""
    if sizes.seq_length < 1 or sizes.global_batch_size < 1:
        raise DataError(
            f"{sizes.path}.seq_length={sizes.seq_length} and {sizes.path}.global_batch_size="
            f"{sizes.global_batch_size} must be positive for epochs to be counted"
        )
    unknown = sizes.weights.keys() - config.data.domains.keys()
    if unknown:
        name = min(unknown)
        raise DataError(
            f"{sizes.path}.weights.{name}: no such domain{nearest(name, config.data.domains)}"
        )
    lengths = {name: sizes.seq_length for name, weight in sizes.weights.items() if weight > 0}
    if not config.data.domains:
        raise DataError(
            "data.domains is empty, so there are no epochs to count; add data.domains.NAME.path="
            "PREFIX, or plan without data by train.num_epochs=null train.num_steps=N"
        )
    if not lengths:
        raise DataError(f"{sizes.path}: no domain has a weight above 0; give one a weight")
    rows = {}
    for name, stream in open_streams(config, lengths).items():
        in_epoch = stream.epoch_length // stream.step(sizes.seq_length)
        rows[name] = max(round(in_epoch * epochs * sizes.weights[name]), 1)
    return rows
