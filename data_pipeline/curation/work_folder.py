"""OUTPUT.partial: who may write there, and what of an interrupted run is kept."""

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import orjson

from data_pipeline.config import PipelineError
from data_pipeline.curation.output import REPORT

logger = logging.getLogger(__name__)


def is_finished(output: Path, identity: str) -> bool:
    """Return whether the folder holds the result of just this curation.

    Raises:
        PipelineError: it holds something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    report = output / REPORT
    if report.is_file() and orjson.loads(report.read_bytes())["identity"] == identity:
        return True
    raise PipelineError(
        f"output={output} exists and is not the result of these steps and inputs; remove it or "
        "give another folder"
    )


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """Create the work folder and hold a lock on it, so that two commands never share it."""
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not work.exists() or os.fstat(descriptor).st_ino != work.stat().st_ino:
            raise BlockingIOError
        yield
    except BlockingIOError:
        raise PipelineError(
            f"{work} is in use by another curation; wait for it or give another output"
        ) from None
    finally:
        os.close(descriptor)


def claim(work: Path, identity: str) -> None:
    """Keep the work folder of an interrupted run of the same curation, remove any other."""
    mark = work / "identity"
    if mark.is_file() and mark.read_text() == identity:
        logger.info("%s: going on with an interrupted run", work)
        return
    mark.unlink(missing_ok=True)
    for entry in work.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    mark.write_text(identity)
