"""`kill -9` of tokenization at random moments: run again, the outcome is that of one quiet run.

CRASH_KILLS is the number of kills: 5 unless set; `make test-crash` sets 50.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_pipeline.train_tokenizer import TrainTokenizer, train_tokenizer

NUM_KILLS = int(os.environ.get("CRASH_KILLS", "5"))
SUFFIXES = ("bin", "idx", "ids", "json")
NUM_DOCUMENTS = 12_000
ALONE_S = 10.0
"""Children must be gone so long after their parent was killed."""

pytestmark = pytest.mark.timeout(60 + 20 * NUM_KILLS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files, the last compressed, of some megabytes; ids missing in one."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij \n<|>", k=rng.randrange(2, 9))) for _ in range(2000)]
    lines = []
    for number in range(NUM_DOCUMENTS):
        text = " ".join(rng.choices(words, k=rng.randrange(0, 300)))
        record = {"text": text} if number % 3 == 0 else {"id": f"d{number}", "text": text}
        lines.append(json.dumps(record) + "\n")
    third = NUM_DOCUMENTS // 3
    (folder / "a.jsonl").write_text("".join(lines[:third]))
    (folder / "b.jsonl").write_text("".join(lines[third : 2 * third]))
    (folder / "c.jsonl").write_text("".join(lines[2 * third :]))
    with_ids = [line for line in lines if '"id"' in line]
    (folder / "train.jsonl").write_text(
        "".join(line.replace('{"id"', '{"domain": "x", "id"', 1) for line in with_ids[:500])
    )
    train_tokenizer(
        TrainTokenizer(input=f"{folder}/train.jsonl", output=f"{folder}/tokenizer", vocab_size=400)
    )
    subprocess.run(["gzip", "-n", str(folder / "c.jsonl")], check=True)
    return folder


def start(corpus: Path, prefix: Path, workers: int) -> subprocess.Popen[str]:
    words = [
        *(f"input={corpus}/[abc].jsonl*", f"tokenizer={corpus}/tokenizer", f"output={prefix}"),
        *(f"workers={workers}", "block_kb=64", "commit_mb=1"),
    ]
    command = [sys.executable, "-m", "data_pipeline.tokenize", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> str:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return errors


def outcome(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES}


def group_is_gone(group: int) -> bool:
    """Return whether every process that a killed parent started has ended."""
    for process in psutil.process_iter(["status"]):
        try:
            if os.getpgid(process.pid) == group and process.info["status"] != "zombie":
                return False
        except ProcessLookupError:
            continue
    return True


def test_killed_runs_go_on_to_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    quiet = tmp_path / "quiet" / "shard"
    began_s = time.monotonic()
    finish(start(corpus, quiet, workers=2))
    longest_s = time.monotonic() - began_s
    expected = outcome(quiet)
    rng = random.Random(1)
    killed = resumed = 0
    for number in range(NUM_KILLS):
        prefix = tmp_path / f"killed{number}" / "shard"
        for _ in range(rng.choice((1, 1, 2, 3))):
            process = start(corpus, prefix, workers=2)
            time.sleep(rng.uniform(0.3, 1.0) * longest_s)
            killed += process.poll() is None
            process.kill()
            process.communicate()
            deadline_s = time.monotonic() + ALONE_S
            while not group_is_gone(process.pid) and time.monotonic() < deadline_s:
                time.sleep(0.01)
            assert group_is_gone(process.pid), "workers linger after their parent was killed"
            assert_nothing_half_written(prefix, expected)
        resumed += "going on after" in finish(start(corpus, prefix, workers=rng.choice((1, 2, 3))))
        assert outcome(prefix) == expected
        left = {path.name for path in prefix.parent.iterdir()}
        assert left == {f"shard.{suffix}" for suffix in SUFFIXES}
    assert killed, "every run had ended before it was killed"
    if NUM_KILLS >= 20:
        assert resumed, "no kill left a commit to go on from"


def assert_nothing_half_written(prefix: Path, expected: dict[str, bytes]) -> None:
    """A reader looks for the index: where it is, everything is."""
    if Path(f"{prefix}.idx").exists():
        assert outcome(prefix) == expected
