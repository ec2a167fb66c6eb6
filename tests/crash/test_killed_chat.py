"""`kill -9` while conversations are tokenized: run again, shard and mask are those of one run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.train_tokenizer import TrainTokenizer, train_tokenizer
from tests.crash.test_killed_tokenization import ALONE_S, finish, group_is_gone

SUFFIXES = ("bin", "idx", "mask", "ids", "json")
NUM_CONVERSATIONS = 20_000
KILLED_AT_BYTES = 700_000
"""Of the growing mask, of 1.4 million: after the first commit of 2^20 bytes of two-byte ids."""

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"What is {n} + {n % 97}? {n + n % 97}, and that is all." for n in range(300)]
    records = [{"id": str(n), "text": text, "domain": "d"} for n, text in enumerate(texts)]
    (folder / "text.json").write_text("".join(json.dumps(r) + "\n" for r in records))
    arguments = {"input": f"{folder}/text.json", "output": f"{folder}/tokenizer"}
    train_tokenizer(TrainTokenizer(vocab_size=280, **arguments))
    lines = []
    for n in range(NUM_CONVERSATIONS):
        user = {"role": "user", "content": f"What is {n} + {n % 97}?"}
        messages = [user, {"role": "assistant", "content": f"{n + n % 97}"}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (folder / "chat.jsonl").write_text("".join(lines))
    return folder


def start(corpus: Path, prefix: Path) -> subprocess.Popen[str]:
    words = [
        *(f"input={corpus}/chat.jsonl", f"tokenizer={corpus}/tokenizer", f"output={prefix}"),
        *("format=chat", "workers=2", "block_kb=16", "commit_mb=1"),
    ]
    command = [sys.executable, "-m", "data_pipeline.tokenize", *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def outcome(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES}


def test_a_killed_run_goes_on_to_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    finish(start(corpus, tmp_path / "quiet"))
    prefix = tmp_path / "killed"
    mask = Path(f"{prefix}.mask.partial")
    process = start(corpus, prefix)
    while process.poll() is None and (not mask.exists() or mask.stat().st_size < KILLED_AT_BYTES):
        time.sleep(0.002)
    assert process.poll() is None, "the run had ended before it was killed"
    process.kill()
    process.communicate()
    deadline_s = time.monotonic() + ALONE_S
    while not group_is_gone(process.pid) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert group_is_gone(process.pid)
    assert not Path(f"{prefix}.idx").exists()
    assert "going on after document" in finish(start(corpus, prefix))
    assert outcome(prefix) == outcome(tmp_path / "quiet")
    assert {path.name for path in tmp_path.glob("killed*")} == {f"killed.{s}" for s in SUFFIXES}
