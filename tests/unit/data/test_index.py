"""Files built once: by one of many processes, whole or not at all."""

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from ring_train.data.errors import DataError
from ring_train.data.index import MIN_WORK, IndexFolder


def test_an_array_is_built_once_and_mapped_from_then_on(tmp_path: Path) -> None:
    built = []

    def build() -> np.ndarray:
        built.append(1)
        return np.arange(10)

    folder = IndexFolder(tmp_path / "index")
    for _ in range(3):
        assert folder.array("x", {"a": 1}, build, BIG).tolist() == [*range(10)]
    assert IndexFolder(tmp_path / "index").array("x", {"a": 1}, build, BIG).tolist() == [*range(10)]
    assert len(built) == 1
    folder.array("x", {"a": 2}, build, BIG)
    folder.array("y", {"a": 1}, build, BIG)
    assert len(built) == 3
    assert not folder.array("x", {"a": 1}, build, BIG).flags.writeable


BIG = MIN_WORK

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")


def test_a_small_array_leaves_no_file(tmp_path: Path) -> None:
    folder = IndexFolder(tmp_path / "index")
    assert folder.array("x", {}, lambda: np.arange(3), BIG - 1).tolist() == [0, 1, 2]
    assert not (tmp_path / "index").exists()


def build_slowly(folder: Path, log: Path) -> None:
    def build() -> np.ndarray:
        with log.open("a") as out:
            out.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return np.arange(5)

    assert IndexFolder(folder).array("x", {}, build, BIG).tolist() == [0, 1, 2, 3, 4]


def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "index", tmp_path / "log")
    processes = [context.Process(target=build_slowly, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 6
    assert len((tmp_path / "log").read_text().splitlines()) == 1


def hang(folder: Path) -> None:
    def build() -> np.ndarray:
        time.sleep(60)
        return np.arange(5)

    IndexFolder(folder).array("x", {}, build, BIG)


def test_a_killed_builder_blocks_nobody_and_leaves_nothing_that_is_read(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=hang, args=(tmp_path,))
    process.start()
    while not list(tmp_path.glob("*.lock")):
        time.sleep(0.01)
    time.sleep(0.1)
    process.kill()
    process.join()
    (torn,) = [path.with_suffix(f".{process.pid}.partial") for path in tmp_path.glob("*.lock")]
    torn.write_bytes(b"half")
    started = time.monotonic()
    assert IndexFolder(tmp_path).array("x", {}, lambda: np.arange(3), BIG).tolist() == [0, 1, 2]
    assert time.monotonic() - started < 5
    assert not torn.exists()


def test_a_damaged_file_and_a_folder_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    folder = IndexFolder(tmp_path / "index")
    folder.array("x", {}, lambda: np.arange(3), BIG)
    (path,) = (tmp_path / "index").glob("x-*.npy")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match=r"x-.*npy is damaged .*remove it"):
        folder.array("x", {}, lambda: np.arange(3), BIG)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.index_dir=.*file/index cannot be written"):
        IndexFolder(tmp_path / "file" / "index").array("x", {}, lambda: np.arange(3), BIG)
