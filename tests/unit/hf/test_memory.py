"""Exporting needs memory for a few tensors, whatever the size of the model."""

import ctypes
import gc
import os
from pathlib import Path

import pytest
import torch

from ring_train.config import WeightFormat, compose
from ring_train.hf.table import make_table
from ring_train.hf.writer import HfFormat, write_hf_folder
from tests.unit.hf.conftest import GOLDEN

MODEL = [
    *("model=tiny", "model.hidden_size=512", "model.moe_ffn_hidden_size=512"),
    *("model.num_moe_experts=32", "model.ffn_hidden_size=512"),
]
NUM_TENSORS = 6
"""Read ahead, in conversion and being written, each in both dtypes."""
M_MMAP_THRESHOLD = -3
"""Of malloc.h: smallest block that is mapped; setting it also stops its growth."""
ALLOCATOR_BYTES = 24 * 2**20
"""What free memory of the allocator and one chunk may add."""


def resident_bytes(word: str) -> int:
    """Return VmRSS or VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{word}:"))
    return int(line.split()[1]) * 1024


def start_high_water() -> int:
    """Let the high-water mark of this process start again; return where it starts, bytes.

    From here on glibc maps every tensor by itself and returns it when it is freed. By default it
    keeps freed ones of a size that depends on what was freed before.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**18)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS")


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_memory_is_that_of_a_few_tensors(weights: WeightFormat, tmp_path: Path) -> None:
    model = compose("pretrain", MODEL).model
    shapes = {name: entry.shape for name, entry in make_table(model).items()}
    sizes = [4 * torch.Size(shape).numel() for shape in shapes.values()]
    bound = NUM_TENSORS * max(sizes) + ALLOCATOR_BYTES
    assert sum(sizes) > 4 * bound  # a model that would show
    before = start_high_water()
    form = HfFormat(weights=weights)
    write_hf_folder(
        tmp_path / "out",
        model,
        lambda name: torch.full(shapes[name], 0.5),
        form=form,
        tokenizer_dir=GOLDEN / "ling_v2",
    )
    grown = resident_bytes("VmHWM") - before
    assert os.path.getsize(tmp_path / "out" / "model.safetensors") > sum(sizes) / 5
    assert grown < bound, f"{grown} of {sum(sizes)} bytes"
