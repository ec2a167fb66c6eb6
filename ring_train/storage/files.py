"""Files that are on the disk when writing returns, and their hashes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FileRecord:
    """What a manifest knows of a file."""

    num_bytes: int
    sha256: str


def write_durably(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a file that is on the disk when this returns; return size and hash."""
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            num_bytes += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(num_bytes, digest.hexdigest())


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
