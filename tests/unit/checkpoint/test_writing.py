"""Writing in the background: what is committed when, and what is left of what fails."""

from __future__ import annotations

import errno
import shutil
import threading
import time
import weakref
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ring_train.checkpoint import CheckpointError, assembly, writing
from ring_train.checkpoint.folders import step_path, whole_steps
from ring_train.checkpoint.manifest import read_manifest
from ring_train.checkpoint.reading import tensor_digests
from ring_train.checkpoint.tensors import Held
from ring_train.checkpoint.writing import Save, SaveJob, prepare_folder, snapshot, write_rank
from ring_train.model.tensors import Shard

SOON_S = 20.0
A_WHILE_S = 0.2
SMALL_FILES = {"config.yaml": "a: 1\n", "train_state.json": "{}"}


def job(folder: Path, rank: int, world_size: int, *, step: int = 1) -> SaveJob:
    """Return what a rank saves of a tensor of which each rank has a row.

    The save has been prepared.
    """
    (partial,) = folder.glob(f"step_{step:08d}.*.partial")
    row = torch.arange(3.0) + 10 * rank
    shard = Shard(dim=0, world=world_size, rank=rank)
    held = Held("weight/a", row, 0, (1, 3), shard, is_written=True)
    tensors, values = snapshot([held], rank)
    return SaveJob(
        folder=folder,
        step=step,
        rank=rank,
        world_size=world_size,
        nonce=partial.suffixes[0][1:],
        tensors=tensors,
        values=values,
        small_files=SMALL_FILES,
        saved_by={"world_size": world_size},
        keep=None,
    )


def exception(future: Future[None]) -> BaseException | None:
    return future.exception(timeout=SOON_S)


def test_a_checkpoint_appears_when_all_ranks_have_written(tmp_path: Path) -> None:
    prepare_folder(tmp_path, 1, 0)
    first = Save(job(tmp_path, 0, 2))
    assert exception(first.written) is None
    time.sleep(A_WHILE_S)
    assert not first.committed.done()
    assert whole_steps(tmp_path) == []
    second = Save(job(tmp_path, 1, 2))
    assert exception(second.written) is None
    assert exception(first.committed) is None
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000001"}
    folder = step_path(tmp_path, 1)
    assert {path.name for path in folder.iterdir()} == {
        *("rank_00000.safetensors", "rank_00001.safetensors"),
        *("config.yaml", "train_state.json", "manifest.json"),
    }
    manifest = read_manifest(folder)
    assert manifest.tensors["weight/a"].shape == (2, 3)
    prepare_folder(tmp_path, 2, 0)
    alone = job(tmp_path, 0, 1, step=2)
    whole = Held("weight/a", torch.tensor([0.0, 1, 2, 10, 11, 12]), 0, (2, 3), Shard(0, 1, 0), True)
    tensors, values = snapshot([whole], 0)
    assert exception(Save(replace(alone, tensors=tensors, values=values)).committed) is None
    other = step_path(tmp_path, 2)
    assert tensor_digests(folder, manifest) == tensor_digests(other, read_manifest(other))


def test_a_rank_of_a_dead_job_cannot_write_into_a_later_save(tmp_path: Path) -> None:
    prepare_folder(tmp_path, 1, 0)
    straggler = job(tmp_path, 1, 2)
    prepare_folder(tmp_path, 1, 0)
    with pytest.raises(FileNotFoundError):
        write_rank(straggler)
    first = Save(job(tmp_path, 0, 2))
    assert exception(first.written) is None
    time.sleep(A_WHILE_S)
    assert not first.committed.done()
    write_rank(job(tmp_path, 1, 2))
    assert exception(first.committed) is None
    assert whole_steps(tmp_path) == [1]


def test_the_copy_of_the_state_is_freed_once_it_is_written(tmp_path: Path) -> None:
    prepare_folder(tmp_path, 1, 0)
    mine = job(tmp_path, 0, 2)
    copy = weakref.ref(mine.values["weight/a#0"])
    save = Save(mine)
    del mine
    assert exception(save.written) is None
    assert not save.committed.done()
    assert copy() is None
    save.abandon()


def test_a_save_whose_folder_disappears_fails(tmp_path: Path) -> None:
    prepare_folder(tmp_path, 1, 0)
    first = Save(job(tmp_path, 0, 2))
    assert exception(first.written) is None
    shutil.rmtree(first.job.partial)
    error = exception(first.committed)
    assert error is not None
    message = writing.save_problem(first.job.target, error)
    assert f"{first.job.partial} was removed while ranks were writing to it" in message
    assert f"one job at a time with run_dir={tmp_path.parent}" in message


def test_nothing_is_left_of_an_abandoned_save(tmp_path: Path) -> None:
    prepare_folder(tmp_path, 1, 0)
    first = Save(job(tmp_path, 0, 2))
    assert exception(first.written) is None
    first.abandon()
    assert list(tmp_path.iterdir()) == []


def test_parts_that_do_not_make_the_tensor_are_never_committed(tmp_path: Path) -> None:
    prepare_folder(tmp_path, 1, 0)
    twice = job(tmp_path, 0, 2)
    write_rank(replace(twice, rank=1))
    error = exception(Save(twice).committed)
    assert isinstance(error, AssertionError)
    assert "overlap" in str(error)
    assert whole_steps(tmp_path) == []


def test_leftovers_go_when_the_next_save_begins(tmp_path: Path) -> None:
    for name in ("step_00000001.removed.partial", "step_00000007.a.partial", "step_00000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank_00000.json").write_text("{}")
    nonce = prepare_folder(tmp_path, 7, 0)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    new = f"step_00000007.{nonce}.partial"
    assert left == ["step_00000003", "step_00000003/rank_00000.json", new]


def test_a_damaged_folder_gives_way_to_the_checkpoint_of_its_step(tmp_path: Path) -> None:
    prepare_folder(tmp_path, 1, 0)
    (step_path(tmp_path, 1)).mkdir()
    (step_path(tmp_path, 1) / "old").touch()
    assert exception(Save(job(tmp_path, 0, 1)).committed) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert whole_steps(tmp_path) == [1]


def test_a_whole_checkpoint_of_another_job_is_kept(tmp_path: Path) -> None:
    prepare_folder(tmp_path, 1, 0)
    mine = job(tmp_path, 0, 1)
    other = replace(mine, nonce="other")
    other.partial.mkdir()
    assert exception(Save(other).committed) is None
    before = step_path(tmp_path, 1).stat().st_ino
    assert exception(Save(mine).committed) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert step_path(tmp_path, 1).stat().st_ino == before


def test_what_cannot_be_removed_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    (tmp_path / "step_00000009.a.partial").mkdir()
    step_path(tmp_path, 1).mkdir()
    for step in (1, 2, 3):
        prepare_folder(tmp_path, step, 0)
        mine = replace(job(tmp_path, 0, 1, step=step), keep=1)
        assert exception(Save(mine).committed) is None
        assert whole_steps(tmp_path) == [step]
    left = {path.name.split(".")[0] for path in tmp_path.glob("*.partial")}
    assert left == {"step_00000001", "step_00000002", "step_00000009"}
    for path in tmp_path.glob("*.partial"):
        assert f"{path} could not be removed" in caplog.text


def test_a_failure_after_the_rename_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(folder: Path, keep: int | None) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(folder))

    prepare_folder(tmp_path, 1, 0)
    monkeypatch.setattr(writing, "retain", refuse)
    assert exception(Save(job(tmp_path, 0, 1)).committed) is None
    assert whole_steps(tmp_path) == [1]
    assert "Stale file handle" in caplog.text
    assert str(step_path(tmp_path, 1)) in caplog.text


def test_a_disk_that_is_too_full_is_refused_with_both_figures(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    needed = 10**18
    with pytest.raises(
        CheckpointError, match=rf"needs {needed} bytes, but \d{{{len(str(free))}}} "
    ):
        prepare_folder(tmp_path, 1, needed)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match=r"step_00000001 could not be saved \(File exists\)"):
        prepare_folder(tmp_path / "checkpoints", 1, 0)


def test_a_full_disk_while_writing_is_reported_by_the_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_folder(tmp_path, 1, 0)
    mine = job(tmp_path, 0, 1)
    (mine.partial / "rank_00000.safetensors").symlink_to("/dev/full")
    save = Save(mine)
    error = exception(save.written)
    assert isinstance(error, OSError)
    assert "No space left on device" in writing.save_problem(save.job.target, error)
    save.abandon()
    assert list(tmp_path.iterdir()) == []


def test_names_are_on_the_disk_before_they_are_relied_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is synced before the folder that names it, and that before the rename counts."""
    calls: list[str] = []
    sync_folder, write = writing.sync_folder, assembly.write_durably

    def spy_sync(folder: Path) -> None:
        calls.append(f"sync {folder.name}")
        sync_folder(folder)

    def spy_write(path: Path, chunks: list[bytes]) -> object:
        calls.append(path.name)
        return write(path, chunks)

    for module in (writing, assembly):
        monkeypatch.setattr(module, "sync_folder", spy_sync)
    monkeypatch.setattr(assembly, "write_durably", spy_write)
    folder = tmp_path / "run" / "checkpoints"
    prepare_folder(folder, 1, 0)
    assert calls == ["sync run"]
    mine = job(folder, 0, 1)
    write_rank(mine)
    writing.commit(mine, threading.Event())
    assert calls[-3:] == ["manifest.json", f"sync {mine.partial.name}", "sync checkpoints"]
