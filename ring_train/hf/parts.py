"""What the files of a folder will hold, known before a tensor is read, and each tensor's turn.

The plan of the files is a pure function of the table, so that ranks agree on it without talking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ring_train.config import WeightFormat
from ring_train.hf.errors import HfError
from ring_train.hf.fp8 import FP8_DTYPE, SCALE_SUFFIX, Fp8Scale, quantize, scale_shape
from ring_train.hf.table import Entry
from ring_train.storage.safetensors import Described

DTYPES = {
    WeightFormat.fp32: torch.float32,
    WeightFormat.bf16: torch.bfloat16,
    WeightFormat.fp8: torch.bfloat16,
}
"""Of what is neither fp32 by definition nor quantised."""
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of a file."""

    entry: Entry
    """What it comes from."""
    hf_name: str
    """Which of the entry's tensors it is, or belongs to."""
    described: Described
    fp8: Fp8Scale | None = None
    """It holds quantised values, or the scales of such."""


def folder_parts(table: dict[str, Entry], weights: WeightFormat) -> list[Part]:
    """Return the tensors of a folder in its order."""
    parts = []
    for entry in table.values():
        dtype = torch.float32 if entry.fp32 else DTYPES[weights]
        scales = entry.fp8 if weights is WeightFormat.fp8 else None
        for i, (name, shape) in enumerate(zip(entry.hf, entry.hf_shapes, strict=True)):
            if scales is None:
                described = Described(name=name, dtype=dtype, shape=shape)
                parts.append(Part(entry=entry, hf_name=name, described=described))
                continue
            rounded = (
                Described(name=name, dtype=FP8_DTYPE, shape=shape),
                Described(name=name + SCALE_SUFFIX, dtype=torch.float32, shape=scale_shape(shape)),
            )
            parts += [
                Part(entry=entry, hf_name=name, described=described, fp8=scales[i])
                for described in rounded
            ]
    return parts


def make_shards(parts: Iterable[Part], max_shard_bytes: int) -> dict[str, list[Part]]:
    """Return which file holds which tensors: as many as fit, one after another.

    A tensor that is larger than a file may be has one for itself. One file is named as
    transformers expects it.
    """
    shards: list[list[Part]] = [[]]
    used_bytes = 0
    for part in parts:
        size = part.described.num_bytes
        if shards[-1] and used_bytes + size > max_shard_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].append(part)
        used_bytes += size
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


class PartReader:
    """Reads the parts of a file by their names; remembers one tensor of the trainer.

    Args:
        parts: of the file.
        read: returns a whole tensor by the trainer's name.
    """

    def __init__(self, parts: Iterable[Part], read: Callable[[str], Tensor]) -> None:
        self._parts = {part.described.name: part for part in parts}
        self._read = read
        self._logical = ""
        self._remembered: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        """Return a tensor as the file shall hold it, contiguous, on the CPU.

        Raises:
            HfError: its shape is another than the config says, or it holds NaN or infinity.
        """
        part = self._parts[name]
        if name not in self._remembered:
            self._remember(part.entry, {p.hf_name: p.fp8 for p in self._parts.values()})
        return self._remembered.pop(name).to(part.described.dtype).contiguous()

    def _remember(self, entry: Entry, scales: dict[str, Fp8Scale | None]) -> None:
        """Read the tensor of an entry and cut it into what files hold."""
        self._remembered = {}
        tensor = self._read(entry.logical).detach().to("cpu")
        if tuple(tensor.shape) != entry.shape:
            raise HfError(
                f"tensor {entry.logical} has shape {list(tensor.shape)}, the config says "
                f"{list(entry.shape)}; the checkpoint is of another model"
            )
        check_finite(entry.logical, tensor)
        for name, rows in entry.to_hf(tensor).items():
            scale = scales.get(name)
            if scale is None:
                self._remembered[name] = rows
            else:
                values, factors = quantize(rows, scale)
                self._remembered |= {name: values, name + SCALE_SUFFIX: factors}


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise HfError, naming the tensor, if it holds NaN or infinity."""
    if not tensor.numel():
        return
    smallest, largest = torch.aminmax(tensor)
    if not (smallest.isfinite() and largest.isfinite()):
        count = int((~tensor.isfinite()).sum())
        raise HfError(
            f"tensor {name} holds {count} values that are NaN or infinite; take weights from "
            "before the training went wrong"
        )
