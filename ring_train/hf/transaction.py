"""A folder that appears whole, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ring_train.hf.errors import HfError


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder beside `output`, which is renamed to it if the block succeeds.

    Raises:
        HfError: `output` exists and is not an empty folder, before or after the block; nothing is
            left behind.
    """
    _check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.parent / f".{output.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        _check_output(output)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_output(output: Path) -> None:
    """Raise unless a folder may appear at `output`."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise HfError(f"output={output} is not a folder; choose a new path")
    if output.is_dir() and any(output.iterdir()):
        raise HfError(f"output={output} is not empty; choose a new path or empty it yourself")
