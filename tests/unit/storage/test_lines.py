"""Lines are appended whole or wait, in order; no failing disk leaves half of one."""

import errno
import os
from pathlib import Path

import pytest

from ring_train.storage.lines import PatientLines, append_text


class Disk:
    """Stands between os.write and the file: takes so many bytes, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.fails = False
        self.write = os.write
        monkeypatch.setattr(os, "write", self)

    def __call__(self, descriptor: int, data: bytes) -> int:
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.room is None:
            return self.write(descriptor, data)
        taken = data[: self.room]
        self.room -= len(taken)
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write(descriptor, taken)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_text(path, "one\n")
    append_text(path, "two\n", durable=True)
    assert path.read_text() == "one\ntwo\n"


def test_a_disk_that_takes_half_a_line_is_left_as_it_was(tmp_path: Path, disk: Disk) -> None:
    path = tmp_path / "records.jsonl"
    append_text(path, "one\n")
    disk.room = 3
    with pytest.raises(OSError, match="No space left"):
        append_text(path, "twenty\n")
    assert path.read_text() == "one\n"


@pytest.mark.parametrize("failure", ["full", "broken"])
def test_lines_wait_in_order_until_the_disk_takes_them(
    failure: str, tmp_path: Path, disk: Disk
) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    lines = PatientLines()
    lines.append(first, "1\n")
    disk.fails, disk.room = failure == "broken", 0 if failure == "full" else None
    lines.append(first, "2\n")
    lines.append(second, "3\n")
    since = lines.failing_since
    assert since is not None
    lines.append(first, "4\n")
    assert lines.failing_since == since, "counted from the first line that waits"
    assert "a.jsonl" in lines.problem
    assert first.read_text() == "1\n"
    disk.fails, disk.room = False, None
    lines.append(second, "5\n")
    assert (first.read_text(), second.read_text()) == ("1\n2\n4\n", "3\n5\n")
    assert lines.failing_since is None


def test_lines_of_a_file_that_is_begun_anew_do_not_come_back(tmp_path: Path, disk: Disk) -> None:
    lines = PatientLines()
    disk.fails = True
    lines.append(tmp_path / "a.jsonl", "old\n")
    lines.append(tmp_path / "b.jsonl", "kept\n")
    lines.discard(tmp_path / "a.jsonl")
    disk.fails = False
    lines.append(tmp_path / "b.jsonl", "new\n")
    assert (tmp_path / "b.jsonl").read_text() == "kept\nnew\n"
    assert (tmp_path / "a.jsonl").read_text() == ""
