"""Which folders are checkpoints: those whose manifest is valid, and nothing else.

A folder that is written or removed has a name of its own, so that what is named like a checkpoint
is never half of one.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from ring_train.checkpoint.errors import CheckpointError
from ring_train.checkpoint.manifest import CONFIG_FILE, MANIFEST_FILE, read_manifest

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds its checkpoints."""
PARTIAL_SUFFIX = ".partial"
STEP_NAME = re.compile(r"step_(\d{8,})")


def step_folders(folder: Path) -> Iterator[tuple[int, Path]]:
    """Yield (step, folder) of what is named like a checkpoint, whole or not, newest first."""
    names = {path: STEP_NAME.fullmatch(path.name) for path in folder.glob("step_*")}
    yield from sorted(((int(m[1]), path) for path, m in names.items() if m), reverse=True)


def whole_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, ascending."""
    return [step for step, path in step_folders(folder) if is_whole(path)][::-1]


def is_whole(path: Path) -> bool:
    """Return whether a folder is a complete checkpoint."""
    try:
        read_manifest(path)
    except CheckpointError:
        return False
    return True


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


def find_checkpoint(folder: Path, key: str) -> Path:
    """Return the folder of a checkpoint: `folder`, or the newest one of a run folder.

    Args:
        folder: of a checkpoint or a run.
        key: what the person called it, for the message.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if (folder / MANIFEST_FILE).is_file():
        read_manifest(folder)
        return folder
    checkpoints = folder / CHECKPOINTS
    newest = newest_step(checkpoints) if whole_steps(checkpoints) else None
    if newest is None:
        raise CheckpointError(
            f"{key}={folder} is neither a complete checkpoint nor a run folder with one; "
            "name RUN_DIR or RUN_DIR/checkpoints/step_00000100"
        )
    return step_path(checkpoints, newest)


def checkpoint_around(path: Path) -> Path | None:
    """Return the checkpoint or the folder of checkpoints that a path lies in or is, if any.

    What lies there is removed with the checkpoint, or taken for one. The path need not exist; it
    is followed both as written and with its symbolic links resolved.
    """
    spellings = (Path(os.path.abspath(path)), Path(os.path.realpath(path)))  # neither raises
    for folder in (above for spelling in spellings for above in (spelling, *spelling.parents)):
        holds_steps = folder.name == CHECKPOINTS and any(step_folders(folder))
        if holds_steps or all((folder / name).is_file() for name in (MANIFEST_FILE, CONFIG_FILE)):
            return folder
    return None


def step_path(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return folder / f"step_{step:08d}"


def partial_path(target: Path, tag: str) -> Path:
    """Return the name of a checkpoint that is not complete yet, or not any more."""
    return target.with_name(f"{target.name}.{tag}{PARTIAL_SUFFIX}")


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that is to be removed; return the name, which nothing ever had."""
    aside = partial_path(path, f"removed_{secrets.token_hex(4)}")
    path.rename(aside)
    return aside


def set_damaged_aside(folder: Path) -> Path:
    """Rename the newest checkpoint of a folder, which is damaged; nothing removes it then."""
    _, path = next(step_folders(folder))
    aside = path.with_name(f"{path.name}.damaged_{secrets.token_hex(4)}")
    path.rename(aside)
    return aside


def drop_after(folder: Path, step: int) -> None:
    """Let checkpoints of more than `step` steps be no more; the next save removes them."""
    for later, path in list(step_folders(folder)):
        if later > step:
            set_aside(path)


def remove_leftovers(folder: Path) -> None:
    """Remove all that is no checkpoint, or not any more."""
    for leftover in folder.glob(f"step_*{PARTIAL_SUFFIX}"):
        remove_leftover(leftover)


def remove_leftover(path: Path) -> None:
    """Remove a folder that is no checkpoint; on failure warn, it is only in the way of space."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s could not be removed (%s); the next save tries again", path, error)


def retain(folder: Path, keep: int | None) -> None:
    """Remove whole checkpoints older than the newest `keep`; damaged ones are left to a person."""
    for step in whole_steps(folder)[:-keep] if keep else []:
        remove_leftover(set_aside(step_path(folder, step)))
