"""The journal of an unfinished shard: PREFIX.journal, one JSON object a line, each synced.

The first line says what is being made (`Job`), every other line how far it is on disk (`Commit`).
The last whole line counts; a torn one is as if it were not there. PREFIX.lock is held meanwhile.
"""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from data_pipeline.config import PipelineError
from data_pipeline.shard_writer import ShardSize

JOURNAL_VERSION = 1

type Job = dict[str, str]
"""Aspect -> digest of what decides the bytes of a shard: tokenizer, inputs, options, software."""


@dataclasses.dataclass(slots=True)
class Commit:
    """Everything that a run needs to go on from here."""

    size: ShardSize = dataclasses.field(default_factory=ShardSize)
    input: int = 0
    """Index of the input being read."""
    block: int = 0
    """Its next block."""
    rows: int = 0
    """Its lines or rows before that block."""
    first_document: int = 0
    """Of that input."""
    skipped: dict[str, int] = dataclasses.field(default_factory=dict)
    characters: int = 0
    chat: dict[str, int] = dataclasses.field(default_factory=dict)
    """Counts of conversations."""
    referee_first_documents: int = 0
    referee_documents: int = 0
    """Later ones, and their characters, chosen by PROBED_FRACTION."""
    referee_characters: int = 0
    closed_inputs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Manifest entries of inputs read to their end; in the journal, those of this line alone."""
    finished: bool = False
    """Index and manifest are written; only renaming is left."""


class Journal:
    """Appends commits, and knows the last one."""

    def __init__(self, path: Path, job: Job) -> None:
        """Read the journal of the same job, or begin an empty one."""
        self._path = path
        self.commit = Commit()
        self.fallback: str | None = None
        """Why the reference encoder is used instead of the fast one."""
        self.left_over: list[str] = []
        """Aspects in which an unfinished run that was found differs from this job."""
        lines = _whole_lines(path)
        if lines and lines[0].get("job") == job and lines[0]["version"] == JOURNAL_VERSION:
            self.fallback = lines[0]["fallback"]
            self.commit = _replay(lines[1:])
            _cut_to_whole_lines(path)
        else:
            if lines:
                found = lines[0].get("job", {})
                self.left_over = [name for name in job | found if found.get(name) != job.get(name)]
            self.restart(job, None)

    def restart(self, job: Job, fallback: str | None) -> None:
        """Begin anew."""
        self._path.unlink(missing_ok=True)
        self.fallback = fallback
        self.commit = Commit()
        self._append({"version": JOURNAL_VERSION, "job": job, "fallback": fallback})

    def write(self, commit: Commit) -> None:
        """Record a commit; what it tells of must be on disk already."""
        num_known = len(self.commit.closed_inputs)
        record = dataclasses.asdict(commit)
        record["closed_inputs"] = record["closed_inputs"][num_known:]
        self._append(record)
        self.commit = dataclasses.replace(
            commit, size=dataclasses.replace(commit.size), closed_inputs=[*commit.closed_inputs]
        )

    def remove(self) -> None:
        """Forget the run: the shard is in place."""
        self._path.unlink(missing_ok=True)

    def _append(self, record: dict[str, Any]) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            line = orjson.dumps(record) + b"\n"
            if os.write(descriptor, line) != len(line):
                raise OSError(f"{self._path}: a line was cut short")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(prefix: Path) -> Iterator[None]:
    """Hold PREFIX.lock; the kernel frees it when the process ends, however it ends.

    Raises:
        PipelineError: another process holds it.
    """
    path = Path(f"{prefix}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(descriptor, path)
        try:
            yield
        finally:
            path.unlink()
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    """Lock the file at `path`, not one that its holder has removed since it was opened."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_ino == path.stat().st_ino:
            return
    except (BlockingIOError, FileNotFoundError):
        pass
    raise PipelineError(
        f"output={path.with_suffix('')} is being written by another process; wait for it, or give "
        "another output"
    )


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Return the records up to the first torn or foreign line."""
    records = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            records.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            break
    return records


def _cut_to_whole_lines(path: Path) -> None:
    num_bytes = 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            orjson.loads(line)
        except orjson.JSONDecodeError:
            break
        num_bytes += len(line) + 1
    os.truncate(path, num_bytes)


def _replay(records: list[dict[str, Any]]) -> Commit:
    closed = [entry for record in records for entry in record["closed_inputs"]]
    if not records:
        return Commit()
    last = Commit(**records[-1])
    last.size = ShardSize(**records[-1]["size"])
    last.closed_inputs = closed
    return last
