"""The model and the tokenizer of `init_from`, which a fine-tuning run takes over."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from ring_train.config import (
    Config,
    DecayLayerRule,
    ModelConfig,
    ParallelConfig,
    read_yaml,
)
from ring_train.hf.config import read_model_config
from ring_train.plan import make_plan, model_at


@dataclass(frozen=True, kw_only=True)
class InitialModel:
    """What a folder of weights says about them."""

    model: ModelConfig
    tokenizer: str
    """Folder; empty if a checkpoint names none."""


def read_initial_model(init_from: str, decay_layer_rule: DecayLayerRule | None) -> InitialModel:
    """Return what a Hugging Face folder, a checkpoint or a run folder says about its model.

    Raises:
        UserError: neither of them, or unreadable.
    """
    folder = Path(init_from)
    if (folder / "config.json").exists():
        return InitialModel(
            model=read_model_config(folder, decay_layer_rule), tokenizer=str(folder)
        )
    from ring_train.checkpoint import find_checkpoint
    from ring_train.checkpoint.manifest import STATE_FILE

    folder = find_checkpoint(folder, "init_from")
    saved: Config = read_yaml(folder / "config.yaml")
    step = json.loads((folder / STATE_FILE).read_text())["step"]
    plan = make_plan(dataclasses.replace(saved, parallel=ParallelConfig()), 1)
    return InitialModel(model=model_at(plan, step), tokenizer=saved.data.tokenizer)
