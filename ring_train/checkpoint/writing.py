"""Writing a checkpoint in the background: each rank its file, rank 0 the manifest and the rename.

A save is a folder `step_00000100.NONCE.partial` until everything in it is on the disk. Each rank
writes `rank_00000.safetensors`, then `rank_00000.json` with what is in it; rank 0 waits for those
of all ranks, writes manifest.json and renames the folder. Nothing here is collective: threads must
not talk over process groups that the training step uses.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ring_train.checkpoint.assembly import assemble, part_name, record_path, write_record
from ring_train.checkpoint.errors import CheckpointError
from ring_train.checkpoint.folders import (
    is_whole,
    partial_path,
    remove_leftover,
    remove_leftovers,
    retain,
    set_aside,
    step_path,
)
from ring_train.checkpoint.manifest import Piece, StoredTensor
from ring_train.checkpoint.tensors import Held
from ring_train.storage.files import sync_folder
from ring_train.storage.safetensors import DTYPE_NAMES, write_tensors

logger = logging.getLogger(__name__)

POLL_S = 0.02


@dataclass(frozen=True)
class SaveJob:
    """What one rank writes of one checkpoint."""

    folder: Path
    """Of all checkpoints."""
    step: int
    rank: int
    world_size: int
    nonce: str
    """The same on all ranks and never again: ranks of a dead job cannot write into this save."""
    tensors: Mapping[str, StoredTensor]
    values: Mapping[str, torch.Tensor]
    """By name in the file."""
    small_files: Mapping[str, str]
    """Texts that rank 0 writes."""
    saved_by: Mapping[str, Any]
    keep: int | None

    @property
    def target(self) -> Path:
        """Where the checkpoint will be."""
        return step_path(self.folder, self.step)

    @property
    def partial(self) -> Path:
        """Where it is written."""
        return partial_path(self.target, self.nonce)


def snapshot(
    held: list[Held], rank: int
) -> tuple[dict[str, StoredTensor], dict[str, torch.Tensor]]:
    """Return what a rank saves, and copies of the values on the host by name in its file."""
    tensors, values = {}, {}
    for item in held:
        pieces = []
        for number, (box, view) in enumerate(item.boxes()):
            name = f"{item.key}#{number}"
            host = torch.empty(box.extent, dtype=view.dtype, device="cpu")
            values[name] = host.copy_(view)
            pieces.append(Piece(part_name(rank), name, box))
        dtype = DTYPE_NAMES[item.values.dtype]
        tensors[item.key] = StoredTensor(dtype, item.full_shape, tuple(pieces))
    return tensors, values


class Save:
    """A save that runs in a thread of its own from the moment this is made.

    Args:
        job: what to write.
        on_committed: called on rank 0, in that thread, once the checkpoint is durable.
    """

    def __init__(self, job: SaveJob, on_committed: Callable[[], None] = lambda: None) -> None:
        # The copies of the state live until they are written: only the list holds them.
        self.job = replace(job, tensors={}, values={})
        self.written: Future[None] = Future()
        self.committed: Future[None] = Future()
        self._abandoned = threading.Event()
        self._on_committed = on_committed
        name = f"save {job.step}"
        threading.Thread(target=self._run, args=([job],), daemon=True, name=name).start()

    def _run(self, pending: list[SaveJob]) -> None:
        _fulfil(self.written, lambda: write_rank(pending.pop()))
        if self.job.rank == 0:
            _fulfil(self.committed, self._commit)
        else:
            self.committed.set_result(None)

    def _commit(self) -> None:
        if commit(self.job, self._abandoned):
            self._on_committed()

    def abandon(self) -> None:
        """Leave nothing of a save that failed, once no rank writes any more."""
        self._abandoned.set()
        self.committed.exception()
        if self.job.rank == 0:
            shutil.rmtree(self.job.partial, ignore_errors=True)


def _fulfil(future: Future[None], function: Callable[[], None]) -> None:
    try:
        function()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(None)


def write_rank(job: SaveJob) -> None:
    """Write a rank's tensors, and then what they are."""
    files = {}
    if job.values:
        name = part_name(job.rank)
        files[name] = write_tensors(job.partial / name, job.values)
    write_record(job.partial, job.rank, files, job.tensors)


def commit(job: SaveJob, abandoned: threading.Event) -> bool:
    """Wait for all ranks, write the manifest, rename the folder and drop old checkpoints.

    Returns whether the checkpoint is there, which it is not if the save was abandoned. A whole
    checkpoint of this step stays; a damaged one gives way.

    Raises:
        CheckpointError, OSError: the checkpoint is not there.
    """
    if not _all_ranks_have_written(job, abandoned):
        return False
    assemble(job.partial, job.world_size, job.small_files, step=job.step, saved_by=job.saved_by)
    if is_whole(job.target):
        # `save` did not begin with one there: it is of another job on this run folder.
        logger.warning("%s was saved by another job meanwhile and is kept", job.target)
        remove_leftover(job.partial)
        return True
    damaged = set_aside(job.target) if job.target.exists() else None
    job.partial.rename(job.target)
    _settle(job, damaged)
    return True


def _settle(job: SaveJob, damaged: Path | None) -> None:
    """Make the rename durable, then remove what it replaces.

    The checkpoint is there, so what fails now is a warning.
    """
    try:
        sync_folder(job.folder)
        logger.info("saved %s", job.target)
        if damaged:
            remove_leftover(damaged)
        retain(job.folder, job.keep)
    except OSError as error:
        logger.warning("%s is saved, but not what is old removed (%s)", job.target, error)


def _all_ranks_have_written(job: SaveJob, abandoned: threading.Event) -> bool:
    """Wait for all ranks; return whether they have written before the save was abandoned.

    Raises:
        CheckpointError: somebody else has removed the folder.
    """
    for rank in range(job.world_size):
        while not record_path(job.partial, rank).exists():
            if abandoned.wait(POLL_S):
                return False
            if not job.partial.is_dir():
                raise CheckpointError(
                    f"{job.partial} was removed while ranks were writing to it; the checkpoints "
                    f"before it are whole: run one job at a time with run_dir={job.folder.parent}, "
                    "remove nothing of a save under way, and resume"
                )
    return True


def prepare_folder(folder: Path, step: int, needed_bytes: int) -> str:
    """Make the folder that all ranks write to, remove what interrupted saves have left.

    Returns the nonce of the save.

    Raises:
        CheckpointError: the disk is too full, or cannot be written.
    """
    target, nonce = step_path(folder, step), secrets.token_hex(4)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        remove_leftovers(folder)
        free_bytes = shutil.disk_usage(folder).free
        if needed_bytes > free_bytes:
            raise CheckpointError(
                f"{target} needs {needed_bytes} bytes, but {free_bytes} are free; "
                "make room, or lower checkpoint.keep"
            )
        partial_path(target, nonce).mkdir()
    except OSError as error:
        raise CheckpointError(save_problem(target, error)) from error
    return nonce


def save_problem(target: Path, error: BaseException) -> str:
    """Return the message for a save that failed."""
    if isinstance(error, CheckpointError):
        return str(error)
    what = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return (
        f"{target} could not be saved ({what}); the checkpoints before it are whole: "
        "make room or repair the disk and resume"
    )
