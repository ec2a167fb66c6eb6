"""The journal: the last whole line counts, also after a torn one."""

from pathlib import Path

import pytest

from data_pipeline.config import PipelineError
from data_pipeline.shard_writer import ShardSize
from data_pipeline.tokenization.journal import Commit, Job, Journal, locked

JOB: Job = {"inputs": "a", "tokenizer": "b"}


def commit(documents: int) -> Commit:
    closed = [{"name": f"{n}.jsonl"} for n in range(documents)]
    return Commit(size=ShardSize(documents=documents), skipped={"empty": 1}, closed_inputs=closed)


def test_the_last_commit_is_found_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", JOB)
    assert journal.commit == Commit()
    for documents in (1, 2, 5):
        journal.write(commit(documents))
    assert Journal(tmp_path / "journal", JOB).commit == commit(5)


def test_a_torn_line_hides_neither_older_nor_newer_commits(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, JOB).write(commit(1))
    for torn in (b'{"size": {"docu', b'{"size": 1}}\n'):
        with path.open("ab") as stream:
            stream.write(torn)
        journal = Journal(path, JOB)
        expected = len(journal.commit.closed_inputs)
        journal.write(commit(expected + 1))
        assert Journal(path, JOB).commit == commit(expected + 1)
    assert Journal(path, JOB).commit == commit(3)


def test_another_job_starts_over_and_says_what_differs(tmp_path: Path) -> None:
    Journal(tmp_path / "journal", JOB).write(commit(1))
    journal = Journal(tmp_path / "journal", {**JOB, "tokenizer": "c"})
    assert journal.left_over == ["tokenizer"]
    assert journal.commit == Commit()
    assert Journal(tmp_path / "journal", {**JOB, "tokenizer": "c"}).left_over == []


def test_the_fallback_is_remembered(tmp_path: Path) -> None:
    Journal(tmp_path / "journal", JOB).restart(JOB, "wrong ids")
    assert Journal(tmp_path / "journal", JOB).fallback == "wrong ids"


def test_a_lock_is_held_once_and_free_again_after_an_error(tmp_path: Path) -> None:
    with locked(tmp_path / "x"), pytest.raises(PipelineError, match="another process"):
        lock_and_fail(tmp_path / "x")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            lock_and_fail(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def lock_and_fail(prefix: Path) -> None:
    with locked(prefix):
        raise ZeroDivisionError
