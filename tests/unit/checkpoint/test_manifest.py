"""manifest.json: what is read is what was written, and every damage is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_train.checkpoint import CheckpointError
from ring_train.checkpoint.boxes import Box
from ring_train.checkpoint.manifest import (
    Manifest,
    Piece,
    StoredTensor,
    manifest_text,
    read_manifest,
)
from ring_train.storage.files import FileRecord

NAME = "rank_00000.safetensors"
TENSOR = StoredTensor(
    "F32",
    (2, 3),
    (
        Piece(NAME, "weight/a#0", Box((0, 0), (1, 3))),
        Piece(NAME, "weight/a#1", Box((1, 0), (1, 3))),
    ),
)


def write_checkpoint(folder: Path, step: int = 2, **changes: Any) -> Manifest:
    """Write a folder of which only the manifest means something."""
    folder.mkdir(parents=True)
    names = (NAME, "config.yaml", "train_state.json")
    for name in names:
        (folder / name).write_bytes(b"x" * 10)
    files = {name: FileRecord(10, "0" * 64) for name in names}
    manifest = replace(Manifest(step, {"world_size": 1}, files, {"weight/a": TENSOR}), **changes)
    (folder / "manifest.json").write_text(manifest_text(manifest))
    return manifest


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_manifest(folder)


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    manifest = write_checkpoint(tmp_path / "a")
    assert read_manifest(tmp_path / "a") == manifest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A checkpoint and its manifest."""
    folder = tmp_path_factory.mktemp("whole") / "a"
    write_checkpoint(folder)
    return folder, (folder / "manifest.json").read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_changed_byte_of_a_manifest_is_seen(
    whole: tuple[Path, bytes], data: st.DataObject
) -> None:
    folder, content = whole[0], bytearray(whole[1])
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    (folder / "manifest.json").write_bytes(content)
    assert_refused(folder, "manifest.json")


def test_another_spelling_of_a_manifest_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    path.write_text(path.read_text().replace(" ", "\t", 1))
    assert_refused(tmp_path / "a", "manifest.json does not have the hash that it states")


def test_a_cut_manifest_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        assert_refused(tmp_path / "a", "manifest.json is no manifest")


@pytest.mark.parametrize("name", [NAME, "config.yaml", "train_state.json"])
def test_missing_and_cut_files_are_named(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(b"x" * 9)
    assert_refused(tmp_path / "a", rf"{name} has 9 bytes, but the manifest says 10: .* remove")
    (tmp_path / "a" / name).unlink()
    assert_refused(tmp_path / "a", f"{name} is missing")


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/b", "", ".", "manifest.json", f"../a/{NAME}", f"{NAME}\n"],
)
def test_names_that_leave_the_folder_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 10)
    manifest = write_checkpoint(tmp_path / "a")
    files = {**manifest.files, name: FileRecord(10, "0" * 64)}
    text = manifest_text(replace(manifest, files=files))
    (tmp_path / "a" / "manifest.json").write_text(text)
    assert_refused(tmp_path / "a", "which is no checkpoint file")


def test_pieces_in_files_that_are_not_listed_are_refused(tmp_path: Path) -> None:
    elsewhere = replace(TENSOR, pieces=(Piece("../secret", "a", Box((0, 0), (2, 3))),))
    write_checkpoint(tmp_path / "a", tensors={"weight/a": elsewhere})
    assert_refused(tmp_path / "a", r"does not list \.\./secret")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (replace(TENSOR, dtype="PICKLE"), "unknown dtype 'PICKLE'"),
        (replace(TENSOR, shape=(-2, 3)), "are not sizes"),
        (replace(TENSOR, shape=(6,)), "another number of dimensions"),
        (
            replace(TENSOR, pieces=(replace(TENSOR.pieces[0], name=cast("str", None)),)),
            "a part of weight/a has no name",
        ),
    ],
)
def test_tensors_that_cannot_be_are_refused(
    tensor: StoredTensor, message: str, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "a", tensors={"weight/a": tensor})
    assert_refused(tmp_path / "a", message)


def test_another_format_version_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "format_version": 2}))
    assert_refused(tmp_path / "a", "format_version=2, but this version of ring_train reads 1; use")


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    assert_refused(
        tmp_path, "no manifest.json, so this is not a complete checkpoint; name a folder"
    )
