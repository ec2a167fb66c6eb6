"""The tensors of a folder: all there, finite, and bit for bit what the trained weights become."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ring_train.config import ModelConfig, WeightFormat
from ring_train.hf.errors import HfError
from ring_train.hf.fp8 import SCALE_SUFFIX, dequantize
from ring_train.hf.parts import PartReader, folder_parts
from ring_train.hf.reader import make_folder_table, table_problems
from ring_train.hf.shards import read_model_files
from ring_train.hf.table import make_table
from ring_train.storage.errors import StorageError
from ring_train.storage.safetensors import DTYPE_NAMES, Stored, as_bytes, read_tensor

Read = Callable[[str], Tensor]
"""Logical name -> whole tensor."""
Outcome = tuple[list[str], dict[str, Any]]


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and bytes, as `verify_checkpoint` prints it."""
    result = hashlib.sha256(f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} ".encode())
    result.update(as_bytes(tensor.contiguous()))
    return result.hexdigest()


def compare_tensors(
    folder: Path, model: ModelConfig, weights: WeightFormat, digests: dict[str, str]
) -> Outcome:
    """Return in what the folder is no one-to-one image of the table, and fill in `digests`.

    Raises:
        HfError: the files of the folder are not sound.
    """
    stored = read_model_files(folder, model.num_layers)
    table = make_folder_table(folder, model, stored)
    differences = table_problems(table, stored)
    dtypes = {part.described.name: part.described.dtype for part in folder_parts(table, weights)}
    num_bytes = 0
    for name, tensor in _tensors(stored):
        digests[name] = digest(tensor)
        num_bytes += tensor.nbytes
        wanted = dtypes.get(name, tensor.dtype)
        if tensor.dtype != wanted:
            differences.append(f"{name} is {tensor.dtype}, not {wanted}")
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            wide = tensor.float()
            counts = f"{int(wide.isnan().sum())} NaN and {int(wide.isinf().sum())} infinite"
            differences.append(f"{name} holds {counts} values")
    return differences, {"num_tensors": len(stored), "num_bytes": num_bytes}


def compare_weights(folder: Path, model: ModelConfig, weights: WeightFormat, read: Read) -> Outcome:
    """Return which tensors of the folder are not, bit for bit, what the trained ones become.

    Tensors that the folder lacks are left to `compare_tensors`.

    Raises:
        HfError: the files of the folder are not sound.
    """
    stored = read_model_files(folder, model.num_layers)
    parts = {part.described.name: part for part in folder_parts(make_table(model), weights)}
    become = PartReader(parts.values(), read)
    differences, num_equal = [], 0
    for name, tensor in _tensors({name: stored[name] for name in parts if name in stored}):
        wanted = become(name)
        if digest(tensor) == digest(wanted):
            num_equal += 1
        else:
            differences.append(f"{name} {_difference(tensor, wanted)}")
    return differences, {"num_equal": num_equal}


def as_exported(model: ModelConfig, weights: WeightFormat, read: Read) -> Read:
    """Return what reads trained tensors in fp32 with what an export leaves of their digits."""
    table = make_table(model)

    def read_rounded(name: str) -> Tensor:
        entry = table[name]
        parts = folder_parts({name: entry}, weights)
        become = PartReader(parts, read)
        values = {part.described.name: become(part.described.name) for part in parts}
        return entry.from_hf({hf_name: wide(values, hf_name) for hf_name in entry.hf})

    return read_rounded


def wide(values: Mapping[str, Tensor], name: str) -> Tensor:
    """Return a tensor of a folder in fp32, given those of its file."""
    scales = values.get(name + SCALE_SUFFIX)
    return values[name].float() if scales is None else dequantize(values[name], scales)


def _tensors(stored: Mapping[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a folder, one in memory."""
    for name, item in stored.items():
        try:
            yield name, read_tensor(item)
        except (StorageError, OSError) as error:
            raise HfError(f"{item.shard} cannot be read ({error}); copy it again") from error


def _difference(tensor: Tensor, wanted: Tensor) -> str:
    """Return how a tensor differs from the trained one."""
    if tensor.shape != wanted.shape:
        return f"has shape {list(tensor.shape)}, the trained one {list(wanted.shape)}"
    apart = (tensor.double() - wanted.double()).abs()
    text = f"differs in {int((apart != 0).sum())} of {apart.numel()} values, by up to"
    if tensor.dtype != wanted.dtype:
        return f"is {tensor.dtype}, the trained one {wanted.dtype}; {text} {apart.max():.3g}"
    return f"{text} {apart.max():.3g}"
