"""Folders of checkpoints: which count, which go, which one a run folder stands for."""

from pathlib import Path

import pytest

from ring_train.checkpoint import CheckpointError
from ring_train.checkpoint.folders import (
    checkpoint_around,
    find_checkpoint,
    newest_step,
    retain,
    step_path,
    whole_steps,
)
from tests.unit.checkpoint.test_manifest import NAME, write_checkpoint


def test_steps_are_those_of_whole_folders(tmp_path: Path) -> None:
    for step in (1, 20, 300):
        write_checkpoint(step_path(tmp_path, step), step)
    write_checkpoint(tmp_path / "step_00000400.partial")
    (tmp_path / "step_00000500x").mkdir()
    assert whole_steps(tmp_path) == [1, 20, 300]
    assert newest_step(tmp_path) == 300
    (step_path(tmp_path, 20) / NAME).write_bytes(b"")
    assert whole_steps(tmp_path) == [1, 300]
    (step_path(tmp_path, 300) / "manifest.json").unlink()
    assert whole_steps(tmp_path) == [1]
    with pytest.raises(CheckpointError, match=r"step_00000300: no manifest\.json"):
        newest_step(tmp_path)
    assert newest_step(tmp_path / "nothing") is None


def test_retention_keeps_the_newest_whole_ones_and_leaves_damaged_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        write_checkpoint(step_path(tmp_path, step), step)
    (step_path(tmp_path, 4) / NAME).unlink()
    retain(tmp_path, None)
    assert whole_steps(tmp_path) == [1, 2, 3, 5]
    retain(tmp_path, 2)
    assert whole_steps(tmp_path) == [3, 5]
    (step_path(tmp_path, 5) / NAME).unlink()
    retain(tmp_path, 1)
    assert whole_steps(tmp_path) == [3]
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["3", "4", "5"]


def test_a_run_folder_stands_for_its_newest_whole_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    with pytest.raises(
        CheckpointError, match=r"folder=.* is neither a complete checkpoint nor a run folder"
    ):
        find_checkpoint(tmp_path, "folder")
    for step in (1, 2):
        write_checkpoint(step_path(folder, step), step)
    assert find_checkpoint(tmp_path, "folder") == step_path(folder, 2)
    assert find_checkpoint(step_path(folder, 1), "folder") == step_path(folder, 1)
    (step_path(folder, 2) / NAME).unlink()
    for damaged in (tmp_path, step_path(folder, 2)):
        with pytest.raises(CheckpointError, match=f"{NAME} is missing"):
            find_checkpoint(damaged, "folder")


def test_what_lies_in_a_checkpoint_or_among_checkpoints_is_known(tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    one, copied = step_path(checkpoints, 1), tmp_path / "copied"
    assert checkpoint_around(checkpoints / "new") is None  # no run
    for folder in (one, copied):
        write_checkpoint(folder)
    assert checkpoint_around(one / "in" / "side") == one
    assert checkpoint_around(checkpoints / "new" / "one") == checkpoints
    assert checkpoint_around(checkpoints) == checkpoints
    assert checkpoint_around(copied / "new") == copied
    (tmp_path / "link").symlink_to(one)
    assert checkpoint_around(tmp_path / "link" / "in") == tmp_path / "link"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("run/export", "run/checkpoints/../export", "loop/export", "checkpoints"):
        assert checkpoint_around(tmp_path / path) is None
    (tmp_path / "manifest.json").touch()  # other folders have one too
    assert checkpoint_around(tmp_path / "export") is None
