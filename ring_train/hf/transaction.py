"""A folder that appears whole, or not at all, also where several ranks write to it."""

import logging
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from ring_train.hf.errors import HfError
from ring_train.runtime.ranks import ALONE, Ranks
from ring_train.storage.files import sync_folder

logger = logging.getLogger(__name__)

Fill = Callable[[Path], None]


def write_folder(
    output: Path,
    fill: Fill,
    finish: Fill | None = None,
    *,
    ranks: Ranks = ALONE,
    needed_bytes: int = 0,
) -> None:
    """Make a folder beside `output`, have it filled, and rename it to `output` last.

    Collective over the ranks.

    Args:
        output: must not exist, or be an empty folder, before and after the work.
        fill: writes a rank's share into the folder that it is given; every rank calls it.
        finish: completes and checks the folder when all shares are there; rank 0 calls it.
        ranks: who writes.
        needed_bytes: what will be written at least, by all of them.

    Raises:
        UserError: on all ranks, if `output` is taken, the disk is full, or `fill` or `finish`
            raised one on any of them. Nothing is left behind and `output` is as it was.
    """
    partial = ranks.from_first(lambda: _make_partial(output, needed_bytes))
    try:
        ranks.agree(lambda: _guarded(output, fill, partial))
        ranks.from_first(lambda: _commit(partial, output, finish))
    finally:
        if ranks.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


def _make_partial(output: Path, needed_bytes: int) -> Path:
    """Return a new folder beside the output; warn of what killed jobs have left."""
    _check_output(output)
    pattern = f".{output.name}.partial-"
    partial = output.parent / f"{pattern}{secrets.token_hex(4)}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        for leftover in output.parent.glob(f"{pattern}*"):
            logger.warning("%s is left of a job that was killed, or is still written", leftover)
        free_bytes = shutil.disk_usage(output.parent).free
        if needed_bytes > free_bytes:
            raise HfError(
                f"output={output} needs {needed_bytes} bytes, but {free_bytes} are free; make "
                "room or choose another disk"
            )
        partial.mkdir()
    except OSError as error:
        raise HfError(_problem(output, error)) from error
    return partial


def _commit(partial: Path, output: Path, finish: Fill | None) -> None:
    if finish is not None:
        _guarded(output, finish, partial)
    _check_output(output)
    sync_folder(partial)
    partial.rename(output)
    sync_folder(output.parent)


def _guarded(output: Path, fill: Fill, partial: Path) -> None:
    try:
        fill(partial)
    except OSError as error:
        raise HfError(_problem(output, error)) from error


def _problem(output: Path, error: OSError) -> str:
    return (
        f"output={output} could not be written ({error}); nothing is left of it: make room or "
        "choose another disk"
    )


def _check_output(output: Path) -> None:
    """Raise unless a folder may appear at `output`."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise HfError(f"output={output} is not a folder; choose a new path")
    if output.is_dir() and any(output.iterdir()):
        raise HfError(f"output={output} is not empty; choose a new path or empty it yourself")
