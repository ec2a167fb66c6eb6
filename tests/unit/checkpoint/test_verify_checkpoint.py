"""The command that verifies a checkpoint."""

from pathlib import Path

import pytest

from ring_train.checkpoint import CheckpointError
from ring_train.checkpoint.folders import step_path
from ring_train.checkpoint.writing import Save, prepare_folder
from ring_train.jobs import verify_checkpoint
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


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "config.yaml", "train_state.json"])
def test_a_changed_byte_is_found(name: str, run_dir: Path) -> None:
    path = step_path(run_dir / "checkpoints", 1) / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} does not have the hash"):
        verify_checkpoint.main([f"folder={run_dir}"])
