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
    folder = find_weights(init_from)
    if is_hf_folder(folder):
        return InitialModel(
            model=read_model_config(folder, decay_layer_rule), tokenizer=str(folder)
        )
    from ring_train.checkpoint.manifest import STATE_FILE

    saved: Config = read_yaml(folder / "config.yaml")
    step = json.loads((folder / STATE_FILE).read_text())["step"]
    plan = make_plan(dataclasses.replace(saved, parallel=ParallelConfig()), 1)
    return InitialModel(model=model_at(plan, step), tokenizer=saved.data.tokenizer)


def find_weights(init_from: str) -> Path:
    """Return the Hugging Face folder or the checkpoint that `init_from` stands for.

    Raises:
        CheckpointError: it is neither of them, nor a run folder; or the checkpoint is damaged.
    """
    from ring_train.checkpoint import CheckpointError, find_checkpoint

    folder = Path(init_from)
    if is_hf_folder(folder):
        return folder
    if not folder.is_dir():
        raise CheckpointError(
            f"init_from={folder} is no folder; name a Hugging Face folder with config.json, "
            "RUN_DIR or RUN_DIR/checkpoints/step_00000100"
        )
    return find_checkpoint(folder, "init_from")


def is_hf_folder(folder: Path) -> bool:
    """Return whether a folder has the config of a Hugging Face model."""
    return (folder / "config.json").exists()
