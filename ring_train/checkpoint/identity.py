"""Whether a checkpoint holds the model that the plan describes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from ring_train.checkpoint.errors import CheckpointError
from ring_train.config import LoraConfig, ModelConfig, TrainConfig, read_yaml

MAY_DIFFER = frozenset(
    {
        "init_method_std",
        "moe_router_bias_update_rate",
        "moe_router_bias_zero_mean",
        "moe_z_loss_coeff",
        "moe_aux_loss_coeff",
        "mtp_loss_scaling_factor",
        "rotary_base",
        "rotary_scaling_factor",
        "original_max_position_embeddings",
        "max_position_embeddings",
        "megatron",
    }
)
"""Fields that later stages of training change without changing what a weight means."""


def check_same_model(config_file: Path, model: ModelConfig, *, weights_only: bool = False) -> None:
    """Raise CheckpointError, naming every differing key, unless the models are the same.

    If only weights are wanted, the model may have fewer MTP depths.
    """
    saved = read_yaml(config_file).model
    may_differ = MAY_DIFFER
    if weights_only and model.mtp_num_layers <= saved.mtp_num_layers:
        may_differ = MAY_DIFFER | {"mtp_num_layers"}
    differing = [
        f"model.{f.name}={getattr(model, f.name)} (checkpoint: {getattr(saved, f.name)})"
        for f in fields(ModelConfig)
        if f.name not in may_differ and getattr(saved, f.name) != getattr(model, f.name)
    ]
    if differing:
        raise CheckpointError(
            f"{config_file.parent}: checkpoint of another model: {'; '.join(differing)}; "
            "use the model of the checkpoint, or another run_dir"
        )


def has_adapters(config_file: Path) -> bool:
    """Return whether a checkpoint holds adapters beside its weights."""
    return read_yaml(config_file).lora.rank is not None


def check_same_adapters(config_file: Path, lora: LoraConfig) -> None:
    """Raise CheckpointError, naming every differing key, unless the adapters are the same."""
    saved = read_yaml(config_file).lora
    differing = [
        f"lora.{f.name}={now} (checkpoint: {before})"
        for f in fields(LoraConfig)
        if (now := _unordered(getattr(lora, f.name)))
        != (before := _unordered(getattr(saved, f.name)))
    ]
    if differing:
        raise CheckpointError(
            f"{config_file.parent}: checkpoint of other adapters: {'; '.join(differing)}; use "
            "those of the checkpoint, or export it and start a new run_dir with init_from=FOLDER"
        )


def _unordered(value: Any) -> Any:
    """Return a list in an order of its own, anything else as it is."""
    return sorted(value) if isinstance(value, list) else value


def check_same_precision(config_file: Path, train: TrainConfig) -> None:
    """Raise CheckpointError unless a run continues in the precision of the checkpoint."""
    saved = read_yaml(config_file).train.precision
    if saved != train.precision:
        raise CheckpointError(
            f"{config_file.parent}: train.precision={train.precision} (checkpoint: {saved}); "
            "resume with the precision of the checkpoint, or start in a new run_dir with "
            f"init_from={config_file.parent}"
        )
