"""A corpus, and what one quiet process makes of it."""

import json
import random
import subprocess
from pathlib import Path

import pytest

from data_pipeline.train_tokenizer import TrainTokenizer, train_tokenizer
from tests.unit.data_pipeline.tokenization.runs import NUM_DOCUMENTS, outcome, run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain and a gz file of about 2 MB, with empty texts and missing ids."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = [
        "".join(rng.choices("abcdefgh\u00e9\u4e2d <|>\n", k=rng.randrange(2, 9)))
        for _ in range(999)
    ]
    texts = [" ".join(rng.choices(words, k=rng.randrange(0, 250))) for _ in range(NUM_DOCUMENTS)]
    texts[10] = texts[2000] = ""
    records = [
        {"text": text} if n % 2 else {"id": f"d{n}", "text": text} for n, text in enumerate(texts)
    ]
    half = NUM_DOCUMENTS // 2
    for name, part in (("a", records[:half]), ("b", records[half:])):
        lines = "".join(json.dumps(record) + "\n" for record in part)
        (folder / f"{name}.jsonl").write_text(lines)
    subprocess.run(["gzip", "-n", str(folder / "b.jsonl")], check=True)
    sample = [{"id": str(n), "text": text, "domain": "d"} for n, text in enumerate(texts[:300])]
    (folder / "sample.json").write_text("".join(json.dumps(record) + "\n" for record in sample))
    arguments = {"input": f"{folder}/sample.json", "output": f"{folder}/tokenizer"}
    train_tokenizer(TrainTokenizer(vocab_size=500, sample_bytes=10**9, **arguments))
    return folder


@pytest.fixture(scope="session")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of it."""
    prefix = tmp_path_factory.mktemp("expected") / "shard"
    run(corpus, prefix)
    return outcome(prefix)
