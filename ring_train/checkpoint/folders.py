"""Which folders are checkpoints: those whose manifest is valid, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ring_train.checkpoint.errors import CheckpointError
from ring_train.checkpoint.manifest import MANIFEST_FILE, read_manifest

STEP_NAME = re.compile(r"step_(\d{8,})")


def step_folders(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield (step, folder) of what is named like a checkpoint, whole or not, newest first."""
    names = {path: STEP_NAME.fullmatch(path.name) for path in folder.glob("step_*")}
    yield from sorted(((int(m[1]), path) for path, m in names.items() if m), reverse=True)


def whole_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, ascending."""
    steps = []
    for step, path in step_folders(folder):
        try:
            read_manifest(path)
        except CheckpointError:
            continue
        steps.append(step)
    return steps[::-1]


def newest_step(folder: Path) -> int | None:
    """Return the step of the newest checkpoint in a folder, None if there is none.

    Raises:
        CheckpointError: the newest is damaged. An interrupted save never leaves that, so nobody
            should lose steps without knowing.
    """
    for step, path in step_folders(folder):
        read_manifest(path)
        return step
    return None


def find_checkpoint(folder: Path) -> Path:
    """Return the folder of a checkpoint: `folder`, or the newest one of a run folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if (folder / MANIFEST_FILE).is_file():
        read_manifest(folder)
        return folder
    checkpoints = folder / "checkpoints"
    newest = newest_step(checkpoints) if whole_steps(checkpoints) else None
    if newest is None:
        raise CheckpointError(
            f"checkpoint={folder} is neither a complete checkpoint nor a run folder with one; "
            "name RUN_DIR or RUN_DIR/checkpoints/step_00000100"
        )
    return step_path(checkpoints, newest)


def step_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return folder / f"step_{step:08d}"
