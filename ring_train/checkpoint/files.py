"""Files of a checkpoint: safetensors written as a stream, hashes, fsync.

Unusual: tensors are written by our own writer of the safetensors format (eight bytes of header
length, a JSON header, the bytes), because the library's neither hashes nor syncs what it writes and
needs the whole file in memory to do so afterwards. Reading uses the library.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "U8": torch.uint8,
}
"""By the names of safetensors."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK_BYTES = 16 * 2**20
HEADER_ALIGNMENT_BYTES = 8


@dataclass(frozen=True)
class FileRecord:
    """What a manifest knows of a file."""

    num_bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Write contiguous CPU tensors as safetensors, durably; return size and hash."""
    # Larger elements first, so that every tensor is aligned to its elements.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header, position = {}, 0
    for name, tensor in ordered:
        end = position + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    data = (chunk for _, tensor in ordered for chunk in _chunks(tensor))
    return write_durably(path, itertools.chain((len(text).to_bytes(8, "little"), text), data))


def _chunks(tensor: torch.Tensor) -> Iterator[memoryview]:
    raw = memoryview(tensor.view(-1).view(torch.uint8).numpy())
    return (raw[i : i + CHUNK_BYTES] for i in range(0, len(raw), CHUNK_BYTES))


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
