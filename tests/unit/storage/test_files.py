"""Files: the safetensors format, and what is on the disk when."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ring_train.storage import files
from ring_train.storage.files import write_durably
from ring_train.storage.safetensors import DTYPES, write_tensors

TENSORS = {
    "odd": torch.arange(3, dtype=torch.uint8),
    "half": torch.randn(5).bfloat16(),
    "single": torch.randn(2, 3),
    "double": torch.randn(1, 1, 1, dtype=torch.float64),
}


def test_files_are_safetensors_that_the_library_reads(tmp_path: Path) -> None:
    record = write_tensors(tmp_path / "a.safetensors", TENSORS)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].equal(tensor)
    assert record.num_bytes == (tmp_path / "a.safetensors").stat().st_size


def test_tensors_can_be_mapped_where_they_lie(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", TENSORS)
    content = (tmp_path / "a.safetensors").read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    assert header_bytes % 8 == 0
    for entry in json.loads(content[8 : 8 + header_bytes]).values():
        assert entry["data_offsets"][0] % DTYPES[entry["dtype"]].itemsize == 0


def test_a_file_is_on_the_disk_when_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(files.os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    write_durably(tmp_path / "a", [b"abc", memoryview(b"de")])
    assert synced == [5]
