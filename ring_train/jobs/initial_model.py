"""What a folder of weights says about itself, for jobs that take over its model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from ring_train.config import (
    Config,
    DecayLayerRule,
    LoraConfig,
    ModelConfig,
    ParallelConfig,
    Precision,
    read_yaml,
)
from ring_train.hf.config import read_model_config
from ring_train.plan import make_plan, model_at


@dataclass(frozen=True, kw_only=True)
class InitialModel:
    """What a folder of weights says about them."""

    folder: Path
    """Hugging Face folder or checkpoint; of a run, its newest checkpoint."""
    model: ModelConfig
    tokenizer: str
    """Folder; empty if a checkpoint names none."""
    precision: Precision | None
    """In which a checkpoint was trained; None = a Hugging Face folder."""
    lora: LoraConfig
    """Adapters beside the weights."""


def read_initial_model(
    path: str, decay_layer_rule: DecayLayerRule | None, key: str = "init_from"
) -> InitialModel:
    """Return what a Hugging Face folder, a checkpoint or a run folder says about its model.

    Args:
        path: the folder.
        decay_layer_rule: for a linear Hugging Face folder whose config does not say it.
        key: what the person called it, for messages.

    Raises:
        UserError: neither of them, or unreadable.
    """
    folder = find_weights(path, key)
    if is_hf_folder(folder):
        return InitialModel(
            folder=folder,
            model=read_model_config(folder, decay_layer_rule),
            tokenizer=str(folder),
            precision=None,
            lora=LoraConfig(),
        )
    from ring_train.checkpoint.manifest import STATE_FILE

    saved: Config = read_yaml(folder / "config.yaml")
    step = json.loads((folder / STATE_FILE).read_text())["step"]
    plan = make_plan(dataclasses.replace(saved, parallel=ParallelConfig()), 1)
    return InitialModel(
        folder=folder,
        model=model_at(plan, step),
        tokenizer=saved.data.tokenizer,
        precision=saved.train.precision,
        lora=saved.lora,
    )


def find_weights(path: str, key: str = "init_from") -> Path:
    """Return the Hugging Face folder or the checkpoint that a path stands for.

    Args:
        path: the folder, or a run folder for its newest checkpoint.
        key: what the person called it, for messages.

    Raises:
        CheckpointError: it is neither of them, nor a run folder; or the checkpoint is damaged.
    """
    from ring_train.checkpoint import CheckpointError, find_checkpoint

    folder = Path(path)
    if is_hf_folder(folder):
        return folder
    if not folder.is_dir():
        raise CheckpointError(
            f"{key}={folder} is no folder; name a Hugging Face folder with config.json, "
            "RUN_DIR or RUN_DIR/checkpoints/step_00000100"
        )
    return find_checkpoint(folder, key)


def is_hf_folder(folder: Path) -> bool:
    """Return whether a folder has the config of a Hugging Face model."""
    return (folder / "config.json").exists()
