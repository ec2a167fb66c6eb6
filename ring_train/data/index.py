"""Files that are computed once and mapped ever after: document orders, schedules, packings.

A file's name is a hash of everything that its content depends on, so it is never changed and never
stale. It is written under another name and renamed; who needs it meanwhile waits for a lock. Where
the file system has no locks, several processes write the same bytes and the last rename stays.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ring_train.data.errors import DataError

logger = logging.getLogger(__name__)

VERSION = 1
"""Part of every name; raised when the content of any kind of file changes its meaning."""
MIN_WORK = 250_000
"""What takes fewer steps than this is computed again in each process rather than kept."""
SLOW_S = 1.0
"""A build that takes longer is logged."""


class IndexFolder:
    """A folder of such files.

    Args:
        folder: created at the first build.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def array(
        self,
        kind: str,
        made_from: dict[str, Any],
        build: Callable[[], np.ndarray],
        work: int,
    ) -> np.ndarray:
        """Return the mapped array of `build()`, which is called only if the file is not there.

        Args:
            kind: begins the file's name.
            made_from: everything the content depends on, as JSON types.
            build: computes the content.
            work: about how many steps `build` takes.

        Raises:
            DataError: the folder cannot be written, or a file in it is damaged.
        """
        if work < MIN_WORK:
            return build()
        path = self.folder / f"{kind}-{digest({'kind': kind, 'version': VERSION, **made_from})}.npy"
        if not path.exists():
            with self._lock(path) as is_locked:
                if not path.exists():
                    if is_locked:
                        _remove_partials(path)
                    _build(path, build)
        try:
            return np.asarray(np.load(path, mmap_mode="r"))
        except (ValueError, EOFError, OSError) as error:
            raise DataError(f"{path} is damaged ({error}); remove it to build it again") from error

    @contextlib.contextmanager
    def _lock(self, path: Path) -> Iterator[bool]:
        """Hold the lock of one file, if there are locks; released if this process dies."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stream = path.with_suffix(".lock").open("w")
        except OSError as error:
            raise DataError(
                f"data.index_dir={self.folder} cannot be written ({error.strerror}); name a "
                "folder that can, or build there first with `python -m ring_train.jobs.build_index`"
            ) from error
        with stream:
            is_locked = False
            with contextlib.suppress(OSError):  # no locks here: see the module's docstring
                fcntl.flock(stream, fcntl.LOCK_EX)
                is_locked = True
            yield is_locked


def digest(content: dict[str, Any]) -> str:
    """Return 32 hexadecimal digits that name a JSON value."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _remove_partials(path: Path) -> None:
    """Remove what processes left that were killed while they held the lock."""
    for left in path.parent.glob(f"{path.stem}.*.partial"):
        left.unlink(missing_ok=True)


def _build(path: Path, build: Callable[[], np.ndarray]) -> None:
    started = time.monotonic()
    content = build()
    partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as stream:
            np.save(stream, content, allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(
            f"{path} cannot be written ({error.strerror}); free {content.nbytes} bytes or name "
            "another data.index_dir"
        ) from error
    if time.monotonic() - started > SLOW_S:
        logger.info("built %s in %.1f s", path, time.monotonic() - started)
