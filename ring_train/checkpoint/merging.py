"""An average of checkpoints as a checkpoint: weights alone, written part by part.

Unusual: what an interrupted merge has written is kept beside the output, under a name that depends
on what is merged, and the same merge goes on from there. Expert biases are averaged like weights:
they are what a controller has added up, so scaling its updates is the decay of its rate.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ring_train.checkpoint.assembly import (
    assemble,
    part_name,
    read_record,
    record_path,
    write_record,
)
from ring_train.checkpoint.boxes import Box
from ring_train.checkpoint.decay_curves import checkpoint_weights
from ring_train.checkpoint.errors import CheckpointError
from ring_train.checkpoint.folders import (
    PARTIAL_SUFFIX,
    checkpoint_around,
    is_whole,
    partial_path,
    remove_leftover,
    step_folders,
)
from ring_train.checkpoint.identity import check_same_adapters, check_same_model
from ring_train.checkpoint.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    MERGED,
    STATE_FILE,
    Piece,
    StoredTensor,
    read_manifest,
)
from ring_train.checkpoint.state import read_state, state_text
from ring_train.checkpoint.weights import WEIGHT, CheckpointWeights, open_weights
from ring_train.config import DecayCurve, read_yaml
from ring_train.storage.errors import StorageError
from ring_train.storage.files import sync_folder, write_durably
from ring_train.storage.safetensors import DTYPE_NAMES, Described, safetensors_chunks

logger = logging.getLogger(__name__)

PART_BYTES = 4 * 2**30
"""A file of the output is closed before it would exceed this; a larger tensor has one alone."""


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Checkpoints of one model and their weights, oldest first."""

    sources: tuple[CheckpointWeights, ...]
    weights: tuple[float, ...]
    curve: DecayCurve

    def described(self) -> list[Described]:
        """Return what the merged checkpoint holds: fp32, or fp64 where a source does."""
        first = self.sources[0]
        return [
            Described(name=name, dtype=self._dtype(name), shape=first.shape(name))
            for name in first.names
        ]

    def _dtype(self, name: str) -> torch.dtype:
        is_fp64 = any(x.master_dtype(name) == torch.float64 for x in self.sources)
        return torch.float64 if is_fp64 else torch.float32

    def read(self, name: str) -> torch.Tensor:
        """Return the average of a tensor, of what the optimizers held, summed up in fp64."""
        total = torch.zeros(self.sources[0].shape(name), dtype=torch.float64)
        for source, weight in zip(self.sources, self.weights, strict=True):
            if weight:
                total.add_(source.read_master(name), alpha=weight)
        return total.to(self._dtype(name))

    def record(self) -> dict[str, Any]:
        """Return what the manifest says about the merge."""
        return {
            "curve": self.curve.value,
            "steps": [source.step for source in self.sources],
            "weights": list(self.weights),
            "manifests": [_manifest_hash(source.folder) for source in self.sources],
        }


def choose_checkpoints(run_dir: Path, last: int | None, steps: Sequence[int] | None) -> list[Path]:
    """Return folders of checkpoints of a run, oldest first; whether they are whole is not checked.

    Raises:
        CheckpointError: fewer than two are meant, or one of them is not there.
    """
    if (last is None) == (steps is None):
        raise CheckpointError(
            f"last={last} and steps={steps}: exactly one says which checkpoints to merge; give "
            "last=8 or steps=[700,800]"
        )
    there = dict(reversed(list(step_folders(run_dir / "checkpoints"))))
    wanted = sorted(steps) if steps is not None else list(there)[-(last or 0) :]
    count = len(wanted) if last is None else last
    if count < 2 or len(set(wanted)) < len(wanted):
        raise CheckpointError(
            f"last={last} and steps={steps}: an average needs two or more different checkpoints; "
            "name more of them"
        )
    missing = [step for step in wanted if step not in there]
    if missing or len(wanted) < count:
        lack = f"no checkpoint of steps {missing}" if missing else "fewer checkpoints"
        raise CheckpointError(
            f"run_dir={run_dir} has {lack}: last={last} and steps={steps}, but there are "
            f"{list(there)}; choose from those (checkpoint.keep=null keeps all of a run)"
        )
    return [there[step] for step in wanted]


def open_merge(folders: Sequence[Path], curve: DecayCurve) -> Merge:
    """Return the merge of checkpoints whose every byte was found right.

    Raises:
        CheckpointError: one is damaged, or they are of different models.
    """
    newest = folders[-1] / CONFIG_FILE
    for folder in folders:
        read_manifest(folder)
    config = read_yaml(newest)
    for folder in folders[:-1]:
        check_same_model(folder / CONFIG_FILE, config.model)
        check_same_adapters(folder / CONFIG_FILE, config.lora)
    sources = tuple(open_weights(folder) for folder in folders)
    for source in sources:
        _check_same_tensors(source, sources[-1])
    steps = [source.step for source in sources]
    return Merge(sources=sources, weights=tuple(checkpoint_weights(curve, steps)), curve=curve)


def _check_same_tensors(one: CheckpointWeights, other: CheckpointWeights) -> None:
    ours, theirs = ({name: x.shape(name) for name in x.names} for x in (one, other))
    differing = sorted(
        name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)
    )
    if differing:
        raise CheckpointError(
            f"{one.folder} and {other.folder} hold different tensors, first {differing[0]}: "
            f"{ours.get(differing[0])} and {theirs.get(differing[0])}; merge checkpoints of one run"
        )


def write_merge(merge: Merge, output: Path) -> None:
    """Write the merged checkpoint, which appears whole or not at all.

    A merge that was interrupted goes on; parts of another one to the same output are removed.

    Raises:
        CheckpointError: there is something at `output`, the disk is full or cannot be written, or
            a source has changed.
    """
    folders = [source.folder for source in merge.sources]
    check_output(output, folders)
    tag = hashlib.sha256(json.dumps(merge.record()).encode()).hexdigest()[:12]
    partial = partial_path(output, f"merge_{tag}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for leftover in output.parent.glob(f"{output.name}.merge_*{PARTIAL_SUFFIX}"):
            if leftover != partial:
                remove_leftover(leftover)
        if not is_whole(partial):
            _write_parts(merge, partial)
        check_output(output, folders)
        partial.rename(output)
        sync_folder(output.parent)
    except (OSError, StorageError) as error:
        raise CheckpointError(
            f"output={output} could not be written ({error}); it is not there. What is done lies "
            f"in {partial}: make room or repair the disk and run the same command, which goes on"
        ) from error


def check_output(output: Path, folders: Sequence[Path]) -> None:
    """Raise CheckpointError unless a merge of these checkpoints may appear at `output`."""
    if output.is_symlink() or (output.exists() and not (output.is_dir() and _is_empty(output))):
        raise CheckpointError(f"output={output} exists; choose a new path or remove it yourself")
    checkpoints = Path(os.path.realpath(folders[0].parent))
    is_among = checkpoints in Path(os.path.realpath(output)).parents
    around = checkpoints if is_among else checkpoint_around(output)
    if around is not None:
        raise CheckpointError(
            f"output={output} lies in {around}, among or inside checkpoints of a run, which would "
            f"resume from it without its optimizer, or remove it; choose a path outside of {around}"
        )


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _write_parts(merge: Merge, partial: Path) -> None:
    """Write what of a merge is not there yet."""
    parts = _parts(merge.described())
    waiting = [number for number in range(len(parts)) if not _is_written(partial, number)]
    needed = sum(item.num_bytes for number in waiting for item in parts[number])
    free = shutil.disk_usage(partial.parent).free
    if needed > free:
        raise CheckpointError(f"{partial} needs {needed} bytes, but {free} are free; make room")
    partial.mkdir(exist_ok=True)
    for number in waiting:
        _write_part(merge, partial, number, parts[number])
    newest = merge.sources[-1].folder
    state, _ = read_state(newest, read_manifest(newest))
    small_files = {
        CONFIG_FILE: (newest / CONFIG_FILE).read_text(encoding="utf-8"),
        STATE_FILE: state_text(state, 0),
    }
    saved_by = {"world_size": 1, MERGED: merge.record()}
    assemble(partial, len(parts), small_files, step=state.step, saved_by=saved_by)


def _parts(described: Sequence[Described]) -> list[list[Described]]:
    """Return consecutive tensors in groups of at most PART_BYTES, or one larger tensor alone."""
    parts: list[list[Described]] = []
    used = PART_BYTES
    for item in described:
        if not parts or used + item.num_bytes > PART_BYTES:
            parts.append([])
            used = 0
        parts[-1].append(item)
        used += item.num_bytes
    return parts


def _is_written(partial: Path, number: int) -> bool:
    """Return whether a part is whole: its record comes after its file is on the disk."""
    if not record_path(partial, number).exists():
        return False
    files, _ = read_record(partial, number)
    return all(
        (partial / name).is_file() and (partial / name).stat().st_size == file.num_bytes
        for name, file in files.items()
    )


def _write_part(merge: Merge, partial: Path, number: int, part: Sequence[Described]) -> None:
    """Write the file of a part, the next tensor read ahead, and its record."""
    name = part_name(number)
    file = write_durably(partial / name, safetensors_chunks(part, merge.read, {}))
    tensors = {
        WEIGHT + item.name: StoredTensor(
            DTYPE_NAMES[item.dtype],
            item.shape,
            (Piece(name, item.name, Box(tuple(0 for _ in item.shape), item.shape)),),
        )
        for item in part
    }
    write_record(partial, number, {name: file}, tensors)
    logger.info("merged part %d: %d tensors", number + 1, len(part))


def _manifest_hash(folder: Path) -> str:
    return hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()
