"""`init_from`: initial weights from a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ring_train.checkpoint import CheckpointError
from ring_train.checkpoint.checkpointer import load_weights
from ring_train.checkpoint.identity import MAY_DIFFER
from ring_train.checkpoint.manifest import CONFIG_FILE
from ring_train.checkpoint.ranks import from_rank_0, on_all_ranks
from ring_train.config import Config, ModelConfig, read_yaml
from ring_train.data.errors import DataError
from ring_train.hf.config import expressible_fields, read_model_config
from ring_train.hf.errors import HfError
from ring_train.hf.weights import load_hf_weights
from ring_train.jobs.initial_model import find_weights, is_hf_folder
from ring_train.plan import Plan

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.process_groups_config import ProcessGroupCollection

logger = logging.getLogger(__name__)


def check_initial_weights(plan: Plan) -> None:
    """Raise a UserError if `init_from` is no folder of weights or holds another model.

    Rank 0 looks, and all ranks raise. Collective over all ranks.
    """
    from_rank_0(lambda: _check(plan))
    from_rank_0(lambda: _check_tokenizer(plan))


def check_same_start(plan: Plan) -> None:
    """Raise a UserError if a run that has begun is given another `init_from` than it began with.

    Rank 0 looks, and all ranks raise. Collective over all ranks.
    """
    from_rank_0(lambda: _check_start(plan))


def _check_start(plan: Plan) -> None:
    record = Path(plan.config.run_dir) / CONFIG_FILE
    now = plan.config.init_from
    if now is None or not record.is_file():
        return
    began: Config = read_yaml(record)
    if began.init_from is not None and Path(began.init_from).resolve() != Path(now).resolve():
        raise CheckpointError(
            f"init_from={now}, but the run in run_dir={plan.config.run_dir} began from "
            f"{began.init_from} and goes on from its own checkpoint; choose another run_dir, or "
            "leave init_from as it was"
        )


def _check(plan: Plan) -> None:
    if plan.config.init_from is None:
        return
    folder = find_weights(plan.config.init_from)
    if is_hf_folder(folder):
        stored = read_model_config(folder, plan.config.decay_layer_rule)
        check_same_folder_model(folder, stored, plan.config.model)


def _check_tokenizer(plan: Plan) -> None:
    """Raise unless the run gives texts the ids that the initial weights were trained with."""
    if plan.config.init_from is None:
        return
    folder = find_weights(plan.config.init_from)
    tokenizer = str(folder)
    if not is_hf_folder(folder):
        saved: Config = read_yaml(folder / CONFIG_FILE)
        tokenizer = saved.data.tokenizer
    check_same_tokenizer(tokenizer, plan.config.data.tokenizer)


def load_initial_weights(
    plan: Plan, model: list[DistributedDataParallel], groups: ProcessGroupCollection
) -> None:
    """Load `init_from` into the model, if it is given; nothing else of a checkpoint is taken.

    `check_initial_weights` is to be called before. Collective over all ranks.

    Raises:
        UserError: the folder is damaged, or a checkpoint of another model.
    """
    from_rank_0(lambda: _check(plan))
    init_from = plan.config.init_from
    if init_from is None:
        return
    folder = Path(from_rank_0(lambda: str(find_weights(init_from))))
    if from_rank_0(lambda: is_hf_folder(folder)):
        stored = from_rank_0(lambda: read_model_config(folder, plan.config.decay_layer_rule))
        on_all_ranks(lambda: load_hf_weights(folder, stored, model))
    else:
        load_weights(folder, model, plan, groups)


def check_same_folder_model(
    folder: Path, stored: ModelConfig, model: ModelConfig, key: str = "init_from"
) -> None:
    """Raise HfError, naming every differing key, unless a folder's weights mean this model.

    Args:
        folder: Hugging Face folder.
        stored: what `read_model_config` said about it.
        model: what it should hold.
        key: what named the folder.
    """
    theirs, ours = expressible_fields(stored), expressible_fields(model)
    may_differ = MAY_DIFFER
    if model.mtp_num_layers <= stored.mtp_num_layers:
        may_differ = MAY_DIFFER | {"mtp_num_layers"}  # depths may be left out
    differing = [
        f"model.{name}={ours.get(name)} (folder: {theirs.get(name)})"
        for name in sorted((ours.keys() | theirs.keys()) - may_differ)
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise HfError(
            f"{key}={folder} holds another model: {'; '.join(differing)}; "
            "use the model of the folder"
        )


IDS = ("added_tokens", "normalizer", "pre_tokenizer", "model")
"""Parts of tokenizer.json that decide which ids a text has."""


def check_same_tokenizer(theirs: str, ours: str) -> None:
    """Raise DataError if two tokenizer folders give a text other ids.

    A folder that is not there any more, or not named, cannot be compared; that is logged.
    """
    if not ours:
        return
    path = Path(theirs) / "tokenizer.json"
    if not theirs or not path.is_file():
        logger.warning("%s is not there: init_from may have been trained with other ids", path)
        return
    before, now = (_id_parts(file) for file in (path, Path(ours) / "tokenizer.json"))
    differing = [name for name in IDS if before.get(name) != now.get(name)]
    if differing:
        raise DataError(
            f"data.tokenizer={ours} gives other ids than the tokenizer of init_from, {theirs}: "
            f"{', '.join(differing)} of tokenizer.json differ; tokenize with the latter and leave "
            "data.tokenizer out"
        )


def _id_parts(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); give a tokenizer's folder") from None
