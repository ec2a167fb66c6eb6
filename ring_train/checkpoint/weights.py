"""The weights of a checkpoint one by one, whole, without the model that they belong to.

What export, merging and conversion read. Needs memory for one tensor and no megatron-core.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ring_train.checkpoint.boxes import Box, tiling_problem
from ring_train.checkpoint.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    Manifest,
    Piece,
    StoredTensor,
    damaged,
    read_manifest,
)
from ring_train.checkpoint.reading import check_hashes, read_checked
from ring_train.storage.errors import StorageError
from ring_train.storage.safetensors import DTYPES, Stored, read_header, read_tensor

WEIGHT, MASTER = "weight/", "master/"
"""Kinds of tensors, with what divides them from a name."""


class CheckpointWeights:
    """An open checkpoint; see `open_weights`."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Remember a checkpoint whose files were found right."""
        self.folder = folder
        self.step = manifest.step
        """Completed optimizer steps."""
        self._tensors = manifest.tensors
        self._headers: dict[str, dict[str, Stored]] = {}

    @property
    def names(self) -> list[str]:
        """Logical names of parameters, expert biases and adapters, in alphabetical order."""
        return sorted(key.removeprefix(WEIGHT) for key in self._tensors if key.startswith(WEIGHT))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the full tensor."""
        return self._tensors[WEIGHT + name].shape

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor, on the CPU, in the dtype that the model computes with."""
        return self._read(self._tensors[WEIGHT + name])

    def read_master(self, name: str) -> torch.Tensor:
        """Return a whole tensor as the optimizer holds it: its fp32 copy where there is one."""
        return self._read(self._tensors.get(MASTER + name) or self._tensors[WEIGHT + name])

    def master_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of what `read_master` returns."""
        return DTYPES[(self._tensors.get(MASTER + name) or self._tensors[WEIGHT + name]).dtype]

    def _read(self, stored: StoredTensor) -> torch.Tensor:
        if len(stored.pieces) == 1:
            return self._piece(stored.pieces[0], stored)
        full = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        whole = Box(tuple(0 for _ in stored.shape), stored.shape)
        for piece in stored.pieces:
            full[piece.box.slices_in(whole)] = self._piece(piece, stored)
        return full

    def _piece(self, piece: Piece, stored: StoredTensor) -> torch.Tensor:
        path = self.folder / piece.file
        try:
            if piece.file not in self._headers:
                self._headers[piece.file] = read_header(path)
            found = self._headers[piece.file].get(piece.name)
            if found is None or (found.dtype, found.shape) != (stored.dtype, piece.box.extent):
                raise damaged(path, f"does not hold {piece.name} as the manifest states")
            return read_tensor(found)
        except (StorageError, OSError) as error:
            raise damaged(path, f"cannot be read ({error})") from error


def open_weights(
    folder: Path, *, check: Callable[[Path, Manifest], None] = check_hashes
) -> CheckpointWeights:
    """Return the weights of a checkpoint whose every byte was found right.

    Args:
        folder: of the checkpoint, see `find_checkpoint`.
        check: compares the files with the hashes of the manifest; jobs of several ranks share that.

    Raises:
        CheckpointError: not complete, or damaged.
    """
    manifest = read_manifest(folder)
    for name in (CONFIG_FILE, STATE_FILE):
        read_checked(folder, manifest, name)
    for key, tensor in manifest.tensors.items():
        problem = tiling_problem(tensor.shape, (piece.box for piece in tensor.pieces))
        if problem:
            raise damaged(folder / MANIFEST_FILE, f"{key}: {problem}")
    check(folder, manifest)
    return CheckpointWeights(folder, manifest)
