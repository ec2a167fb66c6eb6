"""Runs that end early: interrupted, on a full disk, beside another; and those after them."""

import fcntl
import logging
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import PipelineError
from data_pipeline.tokenization.encoders import FastEncoder
from data_pipeline.tokenization.shard_run import ShardRun
from tests.unit.data_pipeline.tokenization.runs import SUFFIXES, outcome, run


def test_a_second_run_has_nothing_to_do(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run(corpus, tmp_path / "shard")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    run(corpus, tmp_path / "shard", workers=2)
    assert "nothing to do" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_changed_input_is_tokenized_again(corpus: Path, tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    source.write_bytes((corpus / "a.jsonl").read_bytes())
    first = run(corpus, tmp_path / "shard", input=str(source))
    source.write_bytes(source.read_bytes() + b'{"text": "more"}\n')
    second = run(corpus, tmp_path / "shard", input=str(source))
    assert second["documents"] == first["documents"] + 1


class Interrupt(BaseException):
    """Stands for a kill, which unwinds nothing."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num_blocks: int) -> None:
    append = ShardRun._append

    def interrupted(self: ShardRun, *arguments: Any) -> None:
        if self._commit.input * 1000 + self._commit.block == num_blocks:
            raise Interrupt
        append(self, *arguments)

    monkeypatch.setattr(ShardRun, "_append", interrupted)


@pytest.mark.parametrize("num_blocks", [0, 1, 20, 1000, 1001])
def test_an_interrupted_run_goes_on_from_its_last_commit(
    corpus: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    num_blocks: int,
) -> None:
    save_each_block(monkeypatch)
    with monkeypatch.context() as patch:
        interrupt_after(patch, num_blocks)
        with pytest.raises(Interrupt):
            run(corpus, tmp_path / "shard")
    assert not (tmp_path / "shard.idx").exists()
    for suffix in ("bin", "ids", "lengths"):  # what a torn write leaves after the commit
        with (tmp_path / f"shard.{suffix}.partial").open("ab") as stream:
            stream.write(b"torn")
    with (tmp_path / "shard.journal").open("ab") as stream:
        stream.write(b'{"size": {"documents": 99')
    run(corpus, tmp_path / "shard")
    assert outcome(tmp_path / "shard") == expected


def save_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    append = ShardRun._append

    def saved(self: ShardRun, *arguments: Any) -> None:
        append(self, *arguments)
        self._save()

    monkeypatch.setattr(ShardRun, "_append", saved)


def test_a_resumed_run_encodes_only_the_rest(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_each_block(monkeypatch)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 20)
        with pytest.raises(Interrupt):
            run(corpus, tmp_path / "shard")
    encoded: list[int] = []
    encode = FastEncoder.encode
    monkeypatch.setattr(
        FastEncoder, "encode", lambda s, texts: encoded.append(len(texts)) or encode(s, texts)
    )
    manifest = run(corpus, tmp_path / "shard")
    assert 0 < sum(encoded) < manifest["documents"] - 300


def test_an_unfinished_run_of_another_job_is_discarded(
    corpus: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_each_block(monkeypatch)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 20)
        with pytest.raises(Interrupt):
            run(corpus, tmp_path / "shard", input=f"{corpus}/a.jsonl", id_key="name")
    run(corpus, tmp_path / "shard")
    assert "an unfinished run with another inputs, options is discarded" in caplog.text
    assert outcome(tmp_path / "shard") == expected


@pytest.mark.parametrize("renamed", range(5))
def test_a_kill_between_two_renames_is_finished_by_the_next_run(
    corpus: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    renamed: int,
) -> None:
    """With an older shard of another input in place."""
    run(corpus, tmp_path / "shard", input=f"{corpus}/a.jsonl")
    replace, calls = Path.replace, []

    def killed(self: Path, target: Any) -> Path:
        if len(calls) == renamed:
            raise Interrupt
        calls.append(target)
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        if renamed < len(SUFFIXES):
            with pytest.raises(Interrupt):
                run(corpus, tmp_path / "shard")
            assert not (tmp_path / "shard.idx").exists()
    run(corpus, tmp_path / "shard")
    assert outcome(tmp_path / "shard") == expected
    assert {path.suffix[1:] for path in tmp_path.iterdir()} == set(SUFFIXES)


def test_two_runs_on_one_output_are_refused(corpus: Path, tmp_path: Path) -> None:
    with (tmp_path / "shard.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PipelineError, match="is being written by another process"):
            run(corpus, tmp_path / "shard")
    assert [path.name for path in tmp_path.iterdir()] == ["shard.lock"]


def test_a_full_disk_is_one_error_and_the_next_run_goes_on(
    corpus: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    """A limit on the size of files stands for the disk: the same failing write."""
    words = [
        *(f"input={corpus}/*.jsonl*", f"tokenizer={corpus}/tokenizer", "block_kb=32"),
        *(f"output={tmp_path}/shard", "commit_mb=1"),
    ]
    limit = len(expected["bin"]) * 9 // 10
    assert limit > 2**20, "a commit must come before the disk is full"
    done = subprocess.run(
        [sys.executable, "-m", "data_pipeline.tokenize", *words],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "File too large; what was committed is kept" in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error" in line]) == 1
    assert not (tmp_path / "shard.idx").exists()
    again = subprocess.run(
        [sys.executable, "-m", "data_pipeline.tokenize", *words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "going on after document" in again.stderr
    assert outcome(tmp_path / "shard") == expected
