"""Reading a checkpoint: which parts of which files a rank needs, are they right, copy them.

Everything is checked before the first element is copied. No collective, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from ring_train.checkpoint.boxes import Box, tiling_problem
from ring_train.checkpoint.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    Manifest,
    Piece,
    StoredTensor,
    damaged,
)
from ring_train.storage.files import sha256_of_file
from ring_train.storage.safetensors import DTYPE_NAMES, DTYPES

if TYPE_CHECKING:
    from ring_train.checkpoint.tensors import Held


@dataclass(frozen=True)
class Copy:
    """Some elements of a piece that go to a tensor."""

    piece: Piece
    source: tuple[slice, ...]
    """Where in the piece."""
    target: torch.Tensor
    """A view of as many elements."""


def plan_copies(
    folder: Path, manifest: Manifest, wanted: Iterable[Held], *, same_dtype: bool
) -> list[Copy]:
    """Return what to copy so that every wanted element comes from the checkpoint.

    Args:
        folder: of the checkpoint, for messages.
        manifest: of the checkpoint.
        wanted: what to fill.
        same_dtype: refuse to convert.

    Raises:
        CheckpointError: a tensor is missing, incomplete or of another shape or dtype.
    """
    copies = []
    for held in wanted:
        stored = manifest.tensors.get(held.key)
        problem = _problem(stored, held, same_dtype=same_dtype)
        if stored is None or problem:
            raise damaged(folder / MANIFEST_FILE, f"{held.key}: {problem}")
        for box, view in held.boxes():
            for piece in stored.pieces:
                common = box.intersection(piece.box)
                if common:
                    source = common.slices_in(piece.box)
                    copies.append(Copy(piece, source, view[common.slices_in(box)]))
    return copies


def _problem(stored: StoredTensor | None, held: Held, *, same_dtype: bool) -> str | None:
    """Return why a stored tensor is not what is wanted."""
    if stored is None:
        return "the tensor is missing"
    if stored.shape != held.full_shape:
        return f"its shape is {list(stored.shape)}, but the model's is {list(held.full_shape)}"
    if same_dtype and DTYPES[stored.dtype] != held.values.dtype:
        return f"its dtype is {stored.dtype}, but the run's is {DTYPE_NAMES[held.values.dtype]}"
    return tiling_problem(stored.shape, (piece.box for piece in stored.pieces))


def read_checked(folder: Path, manifest: Manifest, name: str) -> bytes:
    """Return the content of a small file of a checkpoint.

    Raises:
        CheckpointError: it is not what was written.
    """
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise damaged(folder / name, f"cannot be read ({error})") from error
    if hashlib.sha256(content).hexdigest() != manifest.files[name].sha256:
        raise damaged(folder / name, "does not have the hash that the manifest states")
    return content


def check_hashes(folder: Path, manifest: Manifest, rank: int = 0, world_size: int = 1) -> None:
    """Raise CheckpointError unless this rank's share of the tensor files is what was written.

    Together the ranks read every byte once.
    """
    names = sorted(manifest.files.keys() - {CONFIG_FILE, STATE_FILE})
    for name in names[rank::world_size]:
        try:
            found = sha256_of_file(folder / name)
        except OSError as error:
            raise damaged(folder / name, f"cannot be read ({error})") from error
        if found != manifest.files[name].sha256:
            raise damaged(folder / name, "does not have the hash that the manifest states")


def check_pieces(folder: Path, manifest: Manifest, pieces: Iterable[Piece]) -> None:
    """Raise CheckpointError unless files hold these pieces, by their headers."""
    dtypes = {
        (piece.file, piece.name): tensor.dtype
        for tensor in manifest.tensors.values()
        for piece in tensor.pieces
    }
    by_file: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_file.setdefault(piece.file, []).append(piece)
    for name, in_file in by_file.items():
        try:
            with safe_open(folder / name, framework="pt") as file:
                for piece in in_file:
                    _check_piece(folder / name, file, piece, dtypes[name, piece.name])
        except (SafetensorError, OSError) as error:
            relation = f"does not hold what the manifest states ({error})"
            raise damaged(folder / name, relation) from error


def _check_piece(path: Path, file: Any, piece: Piece, dtype: str) -> None:
    part = file.get_slice(piece.name)
    found = (part.get_dtype(), tuple(part.get_shape()))
    if found != (dtype, piece.box.extent):
        raise damaged(path, f"holds {piece.name} as {found}, which the manifest does not state")


def check_whole(folder: Path, manifest: Manifest) -> None:
    """Raise CheckpointError unless every file and every tensor of a checkpoint is whole."""
    for name in (CONFIG_FILE, STATE_FILE):
        read_checked(folder, manifest, name)
    for key, tensor in manifest.tensors.items():
        problem = tiling_problem(tensor.shape, (piece.box for piece in tensor.pieces))
        if problem:
            raise damaged(folder / MANIFEST_FILE, f"{key}: {problem}")
    check_hashes(folder, manifest)
    pieces = (piece for tensor in manifest.tensors.values() for piece in tensor.pieces)
    check_pieces(folder, manifest, pieces)


@torch.no_grad()
def run_copies(folder: Path, copies: Iterable[Copy]) -> None:
    """Fill the targets from files that were found right."""
    by_file: dict[str, list[Copy]] = {}
    for copy in copies:
        by_file.setdefault(copy.piece.file, []).append(copy)
    for name, in_file in by_file.items():
        with safe_open(folder / name, framework="pt") as file:
            for copy in in_file:
                copy.target.copy_(file.get_slice(copy.piece.name)[copy.source])


def tensor_digests(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Return {kind/logical name: SHA-256 of dtype, shape and bytes of the full tensor}.

    Equal for equal states, whatever layouts saved them. Holds one full tensor at a time.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    check_whole(folder, manifest)
    names = {piece.file for stored in manifest.tensors.values() for piece in stored.pieces}
    with ExitStack() as stack:
        # Opening a file parses its header, which names every tensor of a rank.
        files = {
            name: stack.enter_context(safe_open(folder / name, framework="pt"))
            for name in sorted(names)
        }
        return {key: _digest(stored, files) for key, stored in manifest.tensors.items()}


def _digest(stored: StoredTensor, files: Mapping[str, Any]) -> str:
    """Return the digest of a tensor in open files."""
    full = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    whole = Box(tuple(0 for _ in stored.shape), stored.shape)
    for piece in stored.pieces:
        full[piece.box.slices_in(whole)] = files[piece.file].get_tensor(piece.name)
    digest = hashlib.sha256(f"{stored.dtype} {list(stored.shape)} ".encode())
    digest.update(memoryview(full.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
