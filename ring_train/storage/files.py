"""Files that are on the disk when writing returns, and their hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

before_writing: list[Callable[[Path], None]] = []
"""Called with the path of each file that `write_synced` is about to write: faults for tests."""


@dataclass(frozen=True)
class FileRecord:
    """What a manifest knows of a file."""

    num_bytes: int
    sha256: str


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file that is on the disk when this returns; return size and hash."""
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes | memoryview]:
        for chunk in chunks:
            digest.update(chunk)
            yield chunk

    return FileRecord(write_synced(path, hashed()), digest.hexdigest())


def write_synced(path: Path, chunks: Iterable[bytes | memoryview]) -> int:
    """Write a file that is on the disk when this returns; return its size."""
    num_bytes = 0
    for call in before_writing:
        call(path)
    with path.open("wb", buffering=0) as file:
        for chunk in chunks:
            rest = memoryview(chunk)
            num_bytes += len(rest)
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    return num_bytes


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable: files created, renamed or removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
