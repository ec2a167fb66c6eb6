"""Headers of safetensors files that lie."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from ring_train.storage.errors import StorageError
from ring_train.storage.safetensors import (
    Described,
    read_header,
    read_tensor,
    safetensors_chunks,
    write_tensors,
)

DATA = bytes(range(24))


def write(path: Path, header: Any, data: bytes = DATA) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": entry(0, 24, [7])}, "has 24 bytes"),
        ({"a": entry(0, 24, [2**40, 2**40])}, "has 24 bytes"),
        ({"a": entry(0, 24, [-6])}, "has sizes"),
        ({"a": entry(0, 24, [6.0])}, "has sizes"),
        ({"a": entry(0, 24, [True, 6])}, "has sizes"),
        ({"a": entry(8, 24, [4])}, "begins at byte"),
        ({"a": entry(0, 12, [3]), "b": entry(16, 24, [2])}, "begins at byte"),
        ({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, "begins at byte"),
        ({"a": entry(0, 16, [4])}, "its header describes"),
        ({"a": entry(0, 32, [8])}, "its header describes"),
        ({"a": entry(24, 0, [6], "X")}, "begins at byte"),
        (b'{"a": {}, "a": {}}', "comes twice"),
        (b'{"a":' + b"[" * 100_000, "is not a safetensors file"),
        (b"\xff\xfe", "is not a safetensors file"),
        (b"3", "is not a safetensors file"),
    ],
)
def test_a_header_that_lies_is_refused(header: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=match):
        read_header(write(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize("length", [2**63, 2**62, 100_000_001, 1000])
def test_a_header_longer_than_the_file_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(StorageError, match="fewer than its header"):
        read_header(path)


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": entry(0, 24, [6])})
    stored = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StorageError, match="has become shorter"):
        read_tensor(stored)


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "eighth": torch.randn(5, 2).to(torch.float8_e4m3fn),
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
    }
    write_tensors(tmp_path / "a.safetensors", tensors)
    header = read_header(tmp_path / "a.safetensors")
    assert header.keys() == tensors.keys()
    for name, tensor in tensors.items():
        got = read_tensor(header[name])
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert got.view(torch.uint8).equal(tensor.view(torch.uint8)) if tensor.ndim else got == 3


def test_at_most_one_tensor_is_read_ahead() -> None:
    asked: list[str] = []
    described = [Described(name=name, dtype=torch.float32, shape=(2**22 + 1,)) for name in "abcd"]

    def read(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.zeros(2**22 + 1)

    seen = [len(asked) for _ in safetensors_chunks(described, read, {})]
    assert asked == [*"abcd"]
    taken = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]  # two for the header, two chunks each
    assert all(count <= number + 1 for count, number in zip(seen, taken, strict=True))


def test_a_tensor_that_cannot_be_read_ends_the_file() -> None:
    def read(name: str) -> torch.Tensor:
        raise StorageError(f"{name} is gone")

    described = [Described(name="a", dtype=torch.float32, shape=(1,))]
    with pytest.raises(StorageError, match="a is gone"):
        list(safetensors_chunks(described, read, {}))
