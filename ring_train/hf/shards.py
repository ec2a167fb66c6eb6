"""Which tensors the safetensors files of a folder hold, known from their headers alone.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the data (https://github.com/huggingface/safetensors#format).
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ring_train.hf.errors import HfError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor as a header describes it."""

    shard: Path
    dtype: str
    """Word of the format: F32, BF16 and so on."""
    shape: tuple[int, ...]


def read_stored(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a folder by name, after comparing index, headers and file sizes.

    Raises:
        HfError: no weights, a shard missing, truncated or outside the folder, or an index that
            names tensors which no shard holds, or leaves some out.
    """
    index_path, single_path = folder / INDEX_NAME, folder / SINGLE_NAME
    if index_path.exists() and single_path.exists():
        raise HfError(f"{folder} holds both {INDEX_NAME} and {SINGLE_NAME}; remove the stale one")
    if not index_path.exists():
        if not single_path.exists():
            raise HfError(f"{folder} holds neither {INDEX_NAME} nor {SINGLE_NAME}; export again")
        return read_header(single_path)
    weight_map = _read_weight_map(index_path)
    stored: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
        for tensor, entry in read_header(folder / name).items():
            if weight_map.get(tensor) != name:
                raise HfError(
                    f"{folder / name} holds {tensor}, but {index_path} says "
                    f"{weight_map.get(tensor)!r}; index and shards are of different exports"
                )
            stored[tensor] = entry
    absent = sorted(weight_map.keys() - stored.keys())
    if absent:
        raise HfError(
            f"{index_path} names {len(absent)} tensors that no shard holds, first {absent[0]}; "
            "index and shards are of different exports"
        )
    return stored


def _read_weight_map(path: Path) -> dict[str, str]:
    """Return tensor -> file name of an index, refusing names that leave the folder."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HfError(f"{path} is not a safetensors index ({error!r}); copy it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise HfError(f"{path}: weight_map is empty or not an object; copy the folder again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or Path(name).name != name or name == "..":
            raise HfError(f"{path} puts {tensor} in {name!r}; shards lie in the folder itself")
    return weight_map


def read_header(path: Path) -> dict[str, Stored]:
    """Return the tensors of one safetensors file, whose size must be what its header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(size, MAX_HEADER_BYTES):
                raise HfError(f"{path} has {size} bytes, fewer than its header; copy it again")
            header = json.loads(file.read(header_bytes))
        stored = {name: _stored(path, entry) for name, entry in header.items() if _is_tensor(name)}
        end = max((header[name]["data_offsets"][1] for name in stored), default=0)
    except FileNotFoundError as error:
        raise HfError(f"{path} does not exist; copy the folder again") from error
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, HfError):
            raise
        raise HfError(f"{path} is not a safetensors file ({error}); copy it again") from error
    expected = 8 + header_bytes + end
    if size != expected:
        raise HfError(f"{path} has {size} bytes, its header describes {expected}; copy it again")
    return stored


def _is_tensor(name: str) -> bool:
    return name != "__metadata__"


def _stored(path: Path, entry: dict[str, Any]) -> Stored:
    return Stored(shard=path, dtype=str(entry["dtype"]), shape=tuple(entry["shape"]))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file with the permissions that any other new file gets.

    The library makes it readable for its owner alone, and who serves a folder is often another.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)
