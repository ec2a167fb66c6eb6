"""The safetensors format, read and written one tensor at a time.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the data (https://github.com/huggingface/safetensors#format).

Unusual: the library wants the tensors of a file in memory to write it, and maps a file to read it,
so that its pages count as the process's. Here memory is that of one
tensor, or of two while a file is written: the next one is read ahead.
"""

from __future__ import annotations

import json
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ring_train.storage.errors import StorageError
from ring_train.storage.files import FileRecord, write_durably

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
"""By the names of the format."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
"""The limit of the library."""
HEADER_ALIGNMENT_BYTES = 8
CHUNK_BYTES = 16 * 2**20
METADATA = "__metadata__"
MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
"""What reading JSON of another form raises; lists in lists by the thousand the last."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor as a header describes it."""

    shard: Path
    dtype: str
    """Word of the format: F32, BF16 and so on."""
    shape: tuple[int, ...]
    offset: int
    """First byte in the file."""
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Described:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of a file in the order of their data, after a look at the header alone.

    Raises:
        StorageError: no safetensors file; of another size than its header says; tensors overlap,
            leave holes, or have not as many bytes as their dtype and shape need.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(size, MAX_HEADER_BYTES):
                raise StorageError(f"{path} has {size} bytes, fewer than its header; copy it again")
            header = json.loads(file.read(header_bytes), object_pairs_hook=_unique)
        start = 8 + header_bytes
        named = [(name, _stored(path, name, entry, start)) for name, entry in header.items()]
    except FileNotFoundError as error:
        raise StorageError(f"{path} does not exist; copy the folder again") from error
    except (OSError, struct.error, *MALFORMED) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path} is not a safetensors file ({error}); copy it again") from error
    # Empty tensors come before what begins where they lie.
    tensors = [item for item in named if item[1] is not None]
    ordered = dict(sorted(tensors, key=lambda item: (item[1].offset, item[1].num_bytes)))
    _check_tiling(path, ordered, start, size)
    return ordered


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; a name that comes twice would hide a tensor."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice in its header")
    return found


def _stored(path: Path, name: str, entry: Any, start: int) -> Any:
    """Return the Stored of an entry of a header, None for that of the metadata."""
    if name == METADATA:
        return None
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(type(n) is not int or n < 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name} has sizes {list(shape)} at {begin} to {end}")
    dtype = str(entry["dtype"])
    if dtype in DTYPES and end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{name} is {dtype} {list(shape)}, but has {end - begin} bytes")
    return Stored(shard=path, dtype=dtype, shape=shape, offset=start + begin, num_bytes=end - begin)


def _check_tiling(path: Path, tensors: Mapping[str, Stored], start: int, size: int) -> None:
    """Raise unless the tensors fill the file behind its header, each byte once."""
    position = start
    for name, stored in tensors.items():
        if stored.offset != position or stored.num_bytes < 0:
            raise StorageError(
                f"{path}: {name} begins at byte {stored.offset}, but what lies before it ends at "
                f"{position}; the header is wrong: copy the file again"
            )
        position += stored.num_bytes
    if position != size:
        raise StorageError(
            f"{path} has {size} bytes, its header describes {position}; copy it again"
        )


def read_tensor(stored: Stored) -> torch.Tensor:
    """Return a tensor of a file whose header was checked, in memory of its own.

    Raises:
        StorageError: the dtype is none of DTYPES, or the file has changed since.
    """
    if stored.dtype not in DTYPES:
        raise StorageError(f"{stored.shard}: dtype {stored.dtype} is not one of {[*DTYPES]}")
    tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    if stored.num_bytes:
        rest = as_bytes(tensor)
        with stored.shard.open("rb", buffering=0) as file:
            file.seek(stored.offset)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise StorageError(f"{stored.shard} has become shorter; copy it again")
                rest = rest[count:]
    return tensor


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy())


def safetensors_chunks(
    described: Iterable[Described], read: Callable[[str], torch.Tensor], metadata: dict[str, str]
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a file; a thread asks for each tensor while the one before is taken.

    The order is the given one where that leaves each tensor aligned to its elements; otherwise
    those of larger elements come first.

    Args:
        described: what the file shall hold.
        read: returns a contiguous CPU tensor as described; called in the order of the file.
        metadata: of the file; may be empty.
    """
    ordered = list(described)
    if not _is_aligned(ordered):
        ordered.sort(key=lambda item: -item.dtype.itemsize)
    yield from _header(ordered, metadata)
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = deque(pool.submit(read, item.name) for item in ordered[:1])
        for number, item in enumerate(ordered, start=1):
            tensor = ahead.popleft().result()
            ahead.extend(pool.submit(read, later.name) for later in ordered[number : number + 1])
            assert (tensor.dtype, tuple(tensor.shape)) == (item.dtype, item.shape), item
            raw = as_bytes(tensor)
            for begin in range(0, len(raw), CHUNK_BYTES):
                yield raw[begin : begin + CHUNK_BYTES]
            del tensor, raw  # before the next but one is read


def _is_aligned(items: Iterable[Described]) -> bool:
    position = 0
    for item in items:
        if position % item.dtype.itemsize:
            return False
        position += item.num_bytes
    return True


def _header(ordered: Sequence[Described], metadata: dict[str, str]) -> Iterator[bytes]:
    header: dict[str, Any] = {METADATA: metadata} if metadata else {}
    position = 0
    for item in ordered:
        end = position + item.num_bytes
        header[item.name] = {
            "dtype": DTYPE_NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT_BYTES)
    yield len(text).to_bytes(8, "little")
    yield text


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> FileRecord:
    """Write contiguous CPU tensors durably; return size and hash of the file."""
    described = [
        Described(name=name, dtype=tensor.dtype, shape=tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    return write_durably(path, safetensors_chunks(described, tensors.__getitem__, {}))
