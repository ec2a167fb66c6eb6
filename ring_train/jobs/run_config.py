"""The config of a run from words, for every job that plans one."""

import dataclasses
from pathlib import Path
from typing import Any

from ring_train.config import Config, DecayLayerRule, ModelConfig, compose, read_yaml
from ring_train.errors import UserError

JOBS = ("job=pretrain", "job=sft")
"""Words that say which job's defaults `dry_run` and `build_index` plan with; the first is meant
where none is given."""
ANY_MODEL = "model=tiny"
"""Stands in while only init_from and run_dir are looked at."""


def run_config(root: str, words: list[str]) -> Any:
    """Return the root node of a job that plans a run of another job.

    Raises:
        UserError: a job that plans no run, or see `sft_config`.
    """
    jobs = [word for word in words if word.startswith("job=")]
    others = [word for word in words if word not in jobs]
    if len(jobs) > 1 or any(word not in JOBS for word in jobs):
        raise UserError(f"{' '.join(jobs)} is no job that plans a run; give one of {JOBS}")
    if jobs == ["job=sft"]:
        return sft_config(others, f"{root}_sft")
    return compose(root, others)


def sft_config(words: list[str], root: str = "sft") -> Any:
    """Return a fine-tuning run, with model and tokenizer of its start where the words say nothing.

    A run that has begun has them in its own folder: what it began from may be gone.

    Raises:
        UserError: no `init_from` to take a model from, or a folder without one.
    """
    chosen = any(word.startswith("model=") for word in words)
    first: Config = compose(root, words if chosen else [*words, ANY_MODEL])
    start = _start(first)
    if start is None:
        if chosen:
            return first
        raise UserError(
            "init_from=null, and fine-tuning starts from weights; add init_from=DIR with a "
            "Hugging Face folder, a checkpoint or a run folder (or model=PRESET to start from "
            "random weights)"
        )
    model, tokenizer = start
    config: Config = first if chosen else compose(root, words, model)
    if config.data.tokenizer:
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))


def _start(config: Config) -> tuple[ModelConfig, str] | None:
    """Return model and tokenizer of the run itself, if it has begun, or of `init_from`."""
    run_dir = Path(config.run_dir)
    if (run_dir / "config.yaml").is_file() and any(run_dir.glob("checkpoints/step_*")):
        recorded: Config = read_yaml(run_dir / "config.yaml")
        return recorded.model, recorded.data.tokenizer
    if config.init_from is None:
        return None
    return _initial(config.init_from, config.decay_layer_rule)


def _initial(init_from: str, rule: DecayLayerRule | None) -> tuple[ModelConfig, str]:
    from ring_train.jobs.initial_model import read_initial_model  # heavy for a checkpoint

    initial = read_initial_model(init_from, rule)
    return initial.model, initial.tokenizer
