"""One live job uses a run folder; the lock of a dead one is taken over."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from ring_train.resilience import run_lock
from ring_train.resilience.run_lock import LOCK_FILE, RunInUse, RunLock, read_owner


def change(run_dir: Path, **changes: object) -> None:
    path = run_dir / LOCK_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_free_folder_is_taken_and_given_back(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, None)
    lock.acquire()
    assert read_owner(tmp_path / LOCK_FILE) == lock.owner
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_live_job_of_this_host_is_refused_at_once(tmp_path: Path) -> None:
    RunLock(tmp_path, "12").acquire()
    began = time.monotonic()
    with pytest.raises(RunInUse, match=rf"in use by a live job .* process {os.getpid()}, job 12"):
        RunLock(tmp_path, "12").acquire()
    assert time.monotonic() - began < 1


def test_the_lock_of_a_process_that_was_killed_is_taken(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_hold, args=(tmp_path,))
    process.start()
    while read_owner(tmp_path / LOCK_FILE) is None:
        time.sleep(0.01)
    process.kill()
    process.join()
    lock = RunLock(tmp_path, None)
    lock.acquire()
    assert read_owner(tmp_path / LOCK_FILE) == lock.owner


def _hold(run_dir: Path) -> None:
    RunLock(run_dir, None).acquire()
    time.sleep(60)


def test_a_pid_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    RunLock(tmp_path, None).acquire()
    change(tmp_path, started="1")
    RunLock(tmp_path, None).acquire()


def test_a_requeued_job_takes_over_from_the_node_before(tmp_path: Path) -> None:
    RunLock(tmp_path, "12").acquire()
    change(tmp_path, host="another")
    began = time.monotonic()
    RunLock(tmp_path, "12").acquire()
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("is_renewed", [True, False])
def test_of_another_host_the_renewal_decides(
    is_renewed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "STALE_S", 2.5)
    monkeypatch.setattr(run_lock, "RENEW_S", 0.2 if is_renewed else 60.0)
    RunLock(tmp_path, "12").acquire()
    change(tmp_path, host="another")
    seeker = RunLock(tmp_path, "13")
    if is_renewed:
        with pytest.raises(RunInUse, match="host another"):
            seeker.acquire()
    else:
        seeker.acquire()
        assert read_owner(tmp_path / LOCK_FILE) == seeker.owner


def test_a_lock_that_was_taken_over_is_not_given_back_by_the_old_owner(tmp_path: Path) -> None:
    first = RunLock(tmp_path, "12")
    first.acquire()
    change(tmp_path, host="another")
    second = RunLock(tmp_path, "12")
    second.acquire()
    first.release()
    assert read_owner(tmp_path / LOCK_FILE) == second.owner


def test_a_torn_lock_is_that_of_nobody(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_text('{"host": "a"')
    lock = RunLock(tmp_path, None)
    lock.acquire()
    assert read_owner(tmp_path / LOCK_FILE) == lock.owner
