"""Faults strike exactly where they are said to."""

import errno
import os
from pathlib import Path

import pytest

from ring_train.errors import UserError
from ring_train.resilience.faults import FaultInjector, InjectedCrash, parse_fault
from ring_train.resilience.journal import Journal, read_journal
from ring_train.storage import files


def injector(run_dir: Path, *texts: str, rank: int = 0, attempt: int = 1) -> FaultInjector:
    journal = Journal(run_dir, attempt=attempt, rank=rank)
    return FaultInjector([parse_fault(text) for text in texts], run_dir, journal)


@pytest.mark.parametrize(
    ("text", "relation"),
    [
        ("kind=kil phase=forward", "kind=kil; choose from kill, sigterm"),
        ("phase=forward", "kind=None; choose from"),
        ("kind=kill phase=foward", "phase=foward; choose from start, data, forward"),
        ("kind=kill stp=3", "stp is no word of a fault; did you mean step"),
        ("kind=kill step=three", "step=three is no number"),
        ("kill", "kill is no word of a fault"),
    ],
)
def test_a_mistake_is_named(text: str, relation: str) -> None:
    with pytest.raises(UserError, match=r"resilience\.faults=") as caught:
        parse_fault(text)
    assert relation in str(caught.value)


@pytest.mark.parametrize(
    ("rank", "attempt", "phase", "step", "strikes"),
    [
        (1, 2, "optimizer", 3, True),
        (0, 2, "optimizer", 3, False),
        (1, 1, "optimizer", 3, False),
        (1, 2, "forward", 3, False),
        (1, 2, "optimizer", 4, False),
    ],
)
def test_rank_start_phase_and_step_must_fit(
    rank: int, attempt: int, phase: str, step: int, strikes: bool, tmp_path: Path
) -> None:
    text = "kind=crash phase=optimizer step=3 rank=1 attempt=2"
    faults = injector(tmp_path, text, rank=rank, attempt=attempt)
    if strikes:
        with pytest.raises(InjectedCrash):
            faults.strike(phase, step)
        assert [event["event"] for event in read_journal(tmp_path)] == ["fault"]
    else:
        faults.strike(phase, step)
        assert read_journal(tmp_path) == []


def test_the_third_micro_batch_can_be_meant(tmp_path: Path) -> None:
    faults = injector(tmp_path, "kind=crash phase=forward step=2 call=3")
    faults.strike("forward", 2)
    faults.strike("forward", 2)
    with pytest.raises(InjectedCrash):
        faults.strike("forward", 2)


def test_gradients_are_poisoned_so_many_times(tmp_path: Path) -> None:
    faults = injector(tmp_path, "kind=spike step=2 times=2")
    assert [faults.gradient_factor(step) for step in (1, 2, 2, 2)] == [None, 1000.0, 1000.0, None]


def test_a_disk_is_full_for_so_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "before_writing", [])
    injector(tmp_path, "kind=disk_full step=2 times=2").strike("data", 2)
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            files.write_synced(tmp_path / "file", [b"x"])
    assert files.write_synced(tmp_path / "file", [b"x"]) == 1


def test_a_torn_checkpoint_is_half_of_its_file(tmp_path: Path) -> None:
    for step in (2, 4):
        folder = tmp_path / f"checkpoints/step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "rank_00000.safetensors").write_bytes(b"x" * 100)
    injector(tmp_path, "kind=torn phase=start").strike("start", 1)
    sizes = [path.stat().st_size for path in sorted(tmp_path.rglob("*.safetensors"))]
    assert sizes == [100, 50]
