"""Saving and restoring weights, optimizer state and position of a run.

A checkpoint is the folder `checkpoints/step_00000100`, written under another name and renamed when
complete, so a folder of that name is whole. Inside: megatron's torch_dist files (global tensors,
whatever the layout), `config.yaml` and `train_state.json`. The data position is the step: the data
stream is a pure function of seed and sample index.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model

from ring_train.checkpoint.errors import CheckpointError
from ring_train.checkpoint.identity import check_same_layout, check_same_model
from ring_train.config import to_yaml
from ring_train.plan import Plan

logger = logging.getLogger(__name__)

STATE_FILE = "train_state.json"
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands."""

    step: int = 0
    """Completed optimizer steps."""
    consumed_samples: int = 0
    """Rows of the global sample stream that were trained on."""
    ledger: dict[str, dict[str, int]] = field(default_factory=dict)
    """{phase: {domain: tokens}} that were trained on."""
    mixture: list[dict[str, Any]] = field(default_factory=list)
    """What the samples of each phase depend on, see `ring_train.data.mixture`."""


class Checkpointer:
    """Checkpoints of one run folder.

    Args:
        plan: the plan; its model is checked against a checkpoint before anything is loaded.
        groups: process groups of the mesh.
    """

    def __init__(self, plan: Plan, groups: ProcessGroupCollection) -> None:
        self.plan = plan
        self.groups = groups
        self.folder = Path(plan.config.run_dir) / "checkpoints"

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        found = self.folder.glob("step_*")
        return sorted(
            int(path.name[5:])
            for path in found
            if path.name[5:].isdigit() and (path / STATE_FILE).exists()
        )

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint after `step` steps."""
        return self.folder / f"step_{step:08d}"

    def save(
        self,
        state: TrainState,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
    ) -> Path:
        """Write a checkpoint and drop old ones; return its folder. Collective over all ranks."""
        target = self.path(state.step)
        if state.step in self.steps():
            return target
        partial = target.with_name(f"{target.name}.partial")
        rank = torch.distributed.get_rank()
        if rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        torch.distributed.barrier()
        tensors = _model_state(model, self.groups)
        tensors["optimizer"] = optimizer.sharded_state_dict(
            dict(tensors), metadata=_metadata(self.groups)
        )
        dist_checkpointing.save(tensors, str(partial), validate_access_integrity=True)
        torch.distributed.barrier()
        if rank == 0:
            (partial / CONFIG_FILE).write_text(to_yaml(self.plan.config))
            (partial / STATE_FILE).write_text(json.dumps(asdict(state)))
            partial.rename(target)
            self._retain()
            logger.info("saved %s", target)
        torch.distributed.barrier()
        return target

    def restore_or_init(
        self, model: list[DistributedDataParallel], optimizer: MegatronOptimizer
    ) -> TrainState:
        """Load the newest checkpoint of the run into model and optimizer, if there is one.

        Raises:
            CheckpointError: the run folder belongs to another model or was saved under another
                layout, or the checkpoint is damaged.
        """
        steps = self.steps()
        if not steps:
            return TrainState()
        folder = self.path(steps[-1])
        check_same_model(folder / CONFIG_FILE, self.plan.config.model)
        check_same_layout(folder / CONFIG_FILE, self.plan)
        state = TrainState(**json.loads((folder / STATE_FILE).read_text()))
        template = _model_state(model, self.groups)
        template["optimizer"] = optimizer.sharded_state_dict(
            dict(template), is_loading=True, metadata=_metadata(self.groups)
        )
        loaded = _load(template, folder)
        _load_model(model, loaded)
        optimizer.load_state_dict(loaded["optimizer"])
        logger.info("resumed from %s", folder)
        return state

    def _retain(self) -> None:
        """Remove the oldest complete checkpoints beyond `checkpoint.keep`, never the newest."""
        keep = self.plan.config.checkpoint.keep
        if keep:
            for step in self.steps()[:-keep]:
                shutil.rmtree(self.path(step))


def load_weights(
    folder: Path, model: list[DistributedDataParallel], plan: Plan, groups: ProcessGroupCollection
) -> None:
    """Load the weights and expert biases of a checkpoint, saved under any layout.

    Raises:
        CheckpointError: no complete checkpoint, or one of another model.
    """
    if not (folder / STATE_FILE).exists():
        raise CheckpointError(
            f"{folder}: no {STATE_FILE}, so this is not a complete checkpoint; "
            "name a folder like RUN_DIR/checkpoints/step_00000100"
        )
    check_same_model(folder / CONFIG_FILE, plan.config.model)
    _load_model(model, _load(_model_state(model, groups), folder))


def _metadata(groups: ProcessGroupCollection) -> dict[str, Any]:
    """Return what megatron's modules and optimizers need to describe their state."""
    return {
        "dp_cp_group": groups.dp_cp,
        "singleton_local_shards": False,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }


def _keys(model: list[DistributedDataParallel]) -> list[str]:
    return ["model"] if len(model) == 1 else [f"model{i}" for i in range(len(model))]


def _model_state(
    model: list[DistributedDataParallel], groups: ProcessGroupCollection
) -> dict[str, Any]:
    """Return the sharded state of every chunk of this rank."""
    return {
        key: _unwrap(chunk).sharded_state_dict(metadata=_metadata(groups))
        for key, chunk in zip(_keys(model), model, strict=True)
    }


def _unwrap(chunk: torch.nn.Module) -> MegatronModule:
    return get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True)


def _load(template: dict[str, Any], folder: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        # torch warns of a single process and of megatron's use of ShardedTensor; both are meant.
        warnings.simplefilter("ignore")
        return _load_quietly(template, folder)


def _load_quietly(template: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        loaded: Any = dist_checkpointing.load(template, str(folder), validate_access_integrity=True)
    except Exception as error:
        raise CheckpointError(
            f"{folder}: megatron could not load it ({type(error).__name__}: {error}); it is "
            "damaged; remove it to resume from the one before"
        ) from error
    return loaded


def _load_model(model: list[DistributedDataParallel], loaded: dict[str, Any]) -> None:
    for key, chunk in zip(_keys(model), model, strict=True):
        _unwrap(chunk).load_state_dict(loaded[key])
