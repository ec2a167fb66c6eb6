"""`init_from`: initial weights from a checkpoint or a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ring_train.checkpoint import CheckpointError, load_weights
from ring_train.checkpoint.identity import MAY_DIFFER
from ring_train.checkpoint.ranks import from_rank_0, on_all_ranks
from ring_train.config import ModelConfig
from ring_train.hf.config import read_model_config
from ring_train.hf.errors import HfError
from ring_train.hf.weights import load_hf_weights
from ring_train.hf.writer import expressible_fields
from ring_train.plan import Plan

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.process_groups_config import ProcessGroupCollection


def check_initial_weights(plan: Plan) -> None:
    """Raise a UserError if `init_from` is no folder of weights or holds another model.

    Rank 0 looks, and all ranks raise. Collective over all ranks.
    """
    from_rank_0(lambda: _check(plan))


def _check(plan: Plan) -> None:
    if plan.config.init_from is None:
        return
    folder = Path(plan.config.init_from)
    if _is_hf_folder(folder):
        stored = read_model_config(folder, plan.config.decay_layer_rule)
        check_same_folder_model(folder, stored, plan.config.model)
    elif not folder.is_dir():
        raise CheckpointError(
            f"init_from={folder} is neither a checkpoint nor a Hugging Face folder; "
            "name RUN_DIR/checkpoints/step_00000100 or a folder with config.json"
        )


def load_initial_weights(
    plan: Plan, model: list[DistributedDataParallel], groups: ProcessGroupCollection
) -> None:
    """Load `init_from` into the model, if it is given; nothing else of a checkpoint is taken.

    Collective over all ranks.

    Raises:
        UserError: the folder is damaged, or a checkpoint of another model.
    """
    check_initial_weights(plan)
    if plan.config.init_from is None:
        return
    folder = Path(plan.config.init_from)
    if from_rank_0(lambda: _is_hf_folder(folder)):
        on_all_ranks(lambda: load_hf_weights(folder, plan.config.model, model))
    else:
        load_weights(folder, model, plan, groups)


def _is_hf_folder(folder: Path) -> bool:
    return (folder / "config.json").exists()


def check_same_folder_model(folder: Path, stored: ModelConfig, model: ModelConfig) -> None:
    """Raise HfError, naming every differing key, unless a folder's weights mean this model."""
    theirs, ours = expressible_fields(stored), expressible_fields(model)
    differing = [
        f"model.{name}={ours.get(name)} (folder: {theirs.get(name)})"
        for name in sorted((ours.keys() | theirs.keys()) - MAY_DIFFER)
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise HfError(
            f"init_from={folder} holds another model: {'; '.join(differing)}; "
            "use the model of the folder"
        )
