"""Fine-tune on chat shards: `python -m ring_train.jobs.sft experiment=NAME init_from=DIR ...`.

The model is that of `init_from`, a Hugging Face folder, a checkpoint or a run folder, unless
`model=PRESET` is among the words; so is the tokenizer, unless `data.tokenizer` is given. Everything
else is `pretrain`: the same command on many ranks, and a run folder that holds checkpoints resumes.
"""

import dataclasses
import sys

from ring_train.config import Config, compose
from ring_train.errors import UserError
from ring_train.jobs.pretrain import pretrain
from ring_train.runtime.errors import run_job

ANY_MODEL = "model=tiny"
"""Stands in while only init_from is looked at."""


def main(overrides: list[str]) -> None:
    """Run the fine-tuning job that the overrides describe."""
    pretrain(sft_config(overrides))


def sft_config(overrides: list[str]) -> Config:
    """Return the run, with model and tokenizer of `init_from` where the words say nothing.

    Raises:
        UserError: no `init_from` to take a model from, or a folder without one.
    """
    chosen = any(word.startswith("model=") for word in overrides)
    first: Config = compose("sft", overrides if chosen else [*overrides, ANY_MODEL])
    if first.init_from is None:
        if chosen:
            return first
        raise UserError(
            "init_from=null, and fine-tuning starts from weights; add init_from=DIR with a "
            "Hugging Face folder, a checkpoint or a run folder (or model=PRESET to start from "
            "random weights)"
        )
    from ring_train.jobs.initial_model import read_initial_model

    initial = read_initial_model(first.init_from, first.decay_layer_rule)
    config: Config = first if chosen else compose("sft", overrides, initial.model)
    if config.data.tokenizer:
        return config
    data = dataclasses.replace(config.data, tokenizer=initial.tokenizer)
    return dataclasses.replace(config, data=data)


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
