"""The command that verifies a checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ring_train.checkpoint import CheckpointError, reading
from ring_train.checkpoint.folders import step_path
from ring_train.checkpoint.manifest import read_manifest
from ring_train.checkpoint.tensors import Held
from ring_train.checkpoint.writing import Save, prepare_folder, snapshot
from ring_train.jobs import verify_checkpoint
from ring_train.model.tensors import Shard
from tests.unit.checkpoint.test_writing import SOON_S, job


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    prepare_folder(tmp_path / "checkpoints", 1, 0)
    Save(job(tmp_path / "checkpoints", 0, 1)).committed.result(timeout=SOON_S)
    return tmp_path


def test_a_whole_checkpoint_is_verified(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = step_path(run_dir / "checkpoints", 1)
    verify_checkpoint.main([f"folder={run_dir}"])
    by_run = capsys.readouterr().out
    verify_checkpoint.main([f"folder={folder}"])
    assert capsys.readouterr().out == by_run
    first, second, third = by_run.splitlines()
    assert first.endswith("  weight/a")
    assert second.startswith(f"{folder} is whole: step 1, 1 tensors, ")
    assert third.endswith("  all")


def test_files_are_opened_once_however_many_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    open_file = reading.safe_open

    def spy(path: Path, framework: str) -> object:
        opened.append(path.name)
        return open_file(path, framework=framework)

    prepare_folder(tmp_path, 1, 0)
    mine = job(tmp_path, 0, 1)
    shard = Shard(dim=0, world=1, rank=0)
    rows = [Held(f"weight/{n}", torch.ones(3), 0, (3,), shard, is_written=True) for n in "abcd"]
    tensors, values = snapshot(rows, 0)
    Save(replace(mine, tensors=tensors, values=values)).committed.result(timeout=SOON_S)
    monkeypatch.setattr(reading, "safe_open", spy)
    folder = step_path(tmp_path, 1)
    digests = reading.tensor_digests(folder, read_manifest(folder))
    assert len(digests) == 4
    assert len(set(digests.values())) == 1
    assert len(opened) <= 2  # to check the headers, and to read


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "config.yaml", "train_state.json"])
def test_a_changed_byte_is_found(name: str, run_dir: Path) -> None:
    path = step_path(run_dir / "checkpoints", 1) / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} does not have the hash"):
        verify_checkpoint.main([f"folder={run_dir}"])
