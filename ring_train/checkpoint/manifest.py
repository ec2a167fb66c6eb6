"""manifest.json of a checkpoint: which files it has, and where the boxes of each tensor lie.

The manifest is written last and makes a folder a checkpoint. It holds the size and the SHA-256 of
every other file and a hash of itself, in one canonical form, so that every changed byte is seen.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ring_train.checkpoint.boxes import Box
from ring_train.checkpoint.errors import CheckpointError, DamagedCheckpoint
from ring_train.storage.files import FileRecord
from ring_train.storage.safetensors import DTYPES

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "config.yaml"
STATE_FILE = "train_state.json"
MERGED = "merged"
"""Key of `saved_by` under which an average of checkpoints says what it was made from."""
FILE_NAME = re.compile(r"rank_\d{5,9}\.safetensors|config\.yaml|train_state\.json")


@dataclass(frozen=True)
class Piece:
    """A box of a tensor in a file."""

    file: str
    name: str
    """Of the tensor in the file that holds the box."""
    box: Box


@dataclass(frozen=True)
class StoredTensor:
    """A full tensor in pieces."""

    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    saved_by: Mapping[str, Any]
    """World size and parallel config that wrote it: information, no reader depends on it."""
    files: Mapping[str, FileRecord]
    """By name; the manifest itself is not among them."""
    tensors: Mapping[str, StoredTensor]
    """By kind and logical name: "exp_avg/decoder.final_layernorm.weight"."""


def tensors_record(tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """Return tensors as JSON types; `parse_tensors` is the inverse."""
    return {
        key: {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "pieces": [
                [piece.file, piece.name, list(piece.box.offset), list(piece.box.extent)]
                for piece in tensor.pieces
            ],
        }
        for key, tensor in tensors.items()
    }


def parse_tensors(record: Any) -> dict[str, StoredTensor]:
    """Return tensors from JSON types.

    Raises:
        TypeError, ValueError, KeyError, AttributeError: the record has another form.
    """
    tensors = {}
    for key, entry in record.items():
        shape = _numbers(entry["shape"])
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{key} has the unknown dtype {entry['dtype']!r}")
        pieces = []
        for file, name, offset, extent in entry["pieces"]:
            box = Box(_numbers(offset), _numbers(extent))
            if not (isinstance(file, str) and isinstance(name, str)):
                raise ValueError(f"a part of {key} has no name")
            if not len(box.offset) == len(box.extent) == len(shape):
                raise ValueError(f"a part of {key} has another number of dimensions")
            pieces.append(Piece(file, name, box))
        tensors[key] = StoredTensor(entry["dtype"], shape, tuple(pieces))
    return tensors


def _numbers(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{values} are not sizes")
    return tuple(values)


def manifest_text(manifest: Manifest) -> str:
    """Return the content of manifest.json."""
    record = {
        "format_version": FORMAT_VERSION,
        "step": manifest.step,
        "saved_by": dict(manifest.saved_by),
        "files": {name: asdict(file) for name, file in sorted(manifest.files.items())},
        "tensors": tensors_record(dict(sorted(manifest.tensors.items()))),
    }
    return _canonical({**record, "sha256": _hash(record)})


def _hash(record: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(record).encode()).hexdigest()


def _canonical(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a checkpoint whose files are there, in the right sizes.

    Their content is not looked at: see `ring_train.checkpoint.reading`.

    Raises:
        CheckpointError: the manifest or a file is missing or damaged, or of another version.
    """
    path = folder / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"{folder}: no {MANIFEST_FILE}, so this is not a complete checkpoint; "
            "name a folder like RUN_DIR/checkpoints/step_00000100"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, f"cannot be read ({error})") from error
    try:
        manifest = _parse(path, text)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise damaged(path, f"is no manifest ({type(error).__name__}: {error})") from error
    _check_files(folder, manifest)
    return manifest


def _parse(path: Path, text: str) -> Manifest:
    content: dict[str, Any] = json.loads(text)
    version = content.pop("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version={version!r}, but this version of ring_train reads "
            f"{FORMAT_VERSION}; use the version that wrote it"
        )
    stated = content.pop("sha256")
    record: dict[str, Any] = {"format_version": version, **content}
    if stated != _hash(record) or text != _canonical({**record, "sha256": stated}):
        raise damaged(path, "does not have the hash that it states")
    return Manifest(
        step=int(record["step"]),
        saved_by=record["saved_by"],
        files={name: FileRecord(**entry) for name, entry in record["files"].items()},
        tensors=parse_tensors(record["tensors"]),
    )


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Raise CheckpointError unless every file is inside, there, and as long as stated."""
    used = {piece.file for tensor in manifest.tensors.values() for piece in tensor.pieces}
    missing = sorted({CONFIG_FILE, STATE_FILE, *used} - manifest.files.keys())
    if missing:
        raise damaged(folder / MANIFEST_FILE, f"does not list {missing[0]}")
    for name, file in manifest.files.items():
        path = folder / name
        if not FILE_NAME.fullmatch(name):
            raise damaged(folder / MANIFEST_FILE, f"lists {name!r}, which is no checkpoint file")
        if not path.is_file():
            raise damaged(path, "is missing")
        if path.stat().st_size != file.num_bytes:
            raise damaged(
                path, f"has {path.stat().st_size} bytes, but the manifest says {file.num_bytes}"
            )


def damaged(path: Path, relation: str) -> DamagedCheckpoint:
    """Return the error for a file of a checkpoint that is not what was written."""
    return DamagedCheckpoint(
        f"{path} {relation}: the checkpoint is damaged; restore the file from a copy, or remove "
        "the folder to go on from the checkpoint before"
    )
