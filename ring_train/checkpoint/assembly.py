"""A checkpoint put together from parts that were written one by one, by ranks or one after another.

Each part is `rank_00000.safetensors` and then `rank_00000.json` with what is in it, so that a part
with its record is whole. `assemble` makes the manifest of all of them; the rename is the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ring_train.checkpoint.boxes import tiling_problem
from ring_train.checkpoint.manifest import (
    MANIFEST_FILE,
    Manifest,
    StoredTensor,
    manifest_text,
    parse_tensors,
    tensors_record,
)
from ring_train.storage.files import FileRecord, sync_folder, write_durably


def part_name(number: int) -> str:
    """Return the name of the file of a part."""
    return f"rank_{number:05d}.safetensors"


def record_path(folder: Path, number: int) -> Path:
    """Return where it is written what a part holds."""
    return folder / f"rank_{number:05d}.json"


def write_record(
    folder: Path, number: int, files: Mapping[str, FileRecord], tensors: Mapping[str, StoredTensor]
) -> None:
    """Write durably what a part holds: its files by name, and the pieces of tensors in them."""
    record = {
        "files": {name: asdict(file) for name, file in files.items()},
        "tensors": tensors_record(tensors),
    }
    path = record_path(folder, number)
    unnamed = path.with_suffix(".tmp")
    write_durably(unnamed, [json.dumps(record).encode()])
    unnamed.rename(path)


def read_record(folder: Path, number: int) -> tuple[dict[str, FileRecord], dict[str, StoredTensor]]:
    """Return (files, tensors) of a part that was recorded."""
    record = json.loads(record_path(folder, number).read_bytes())
    files = {name: FileRecord(**file) for name, file in record["files"].items()}
    return files, parse_tensors(record["tensors"])


def assemble(
    folder: Path,
    num_parts: int,
    small_files: Mapping[str, str],
    *,
    step: int,
    saved_by: Mapping[str, Any],
) -> None:
    """Write the manifest of parts that are all there; their records go.

    Args:
        folder: of the parts.
        num_parts: numbered from 0.
        small_files: texts to write, by name.
        step: completed optimizer steps.
        saved_by: information for the manifest.
    """
    files = {
        name: write_durably(folder / name, [text.encode()]) for name, text in small_files.items()
    }
    tensors: dict[str, StoredTensor] = {}
    for number in range(num_parts):
        part_files, parts = read_record(folder, number)
        files |= part_files
        for key, part in parts.items():
            before = tensors[key].pieces if key in tensors else ()
            tensors[key] = StoredTensor(part.dtype, part.shape, before + part.pieces)
    for key, tensor in tensors.items():
        problem = tiling_problem(tensor.shape, (piece.box for piece in tensor.pieces))
        assert problem is None, f"{key}: {problem}"
    for number in range(num_parts):
        record_path(folder, number).unlink()
    text = manifest_text(Manifest(step, saved_by, files, tensors))
    write_durably(folder / MANIFEST_FILE, [text.encode()])
    sync_folder(folder)
