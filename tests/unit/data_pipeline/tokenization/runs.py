"""Runs of tokenization on the corpus of conftest.py."""

import json
from pathlib import Path
from typing import Any

from data_pipeline.tokenize import Tokenize, tokenize

SUFFIXES = ("bin", "idx", "ids", "json")
NUM_DOCUMENTS = 3000


def run(corpus: Path, prefix: Path, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "input": f"{corpus}/*.jsonl*",
        "tokenizer": f"{corpus}/tokenizer",
        "block_kb": 32,
    }
    tokenize(Tokenize(output=str(prefix), **(arguments | changes)))
    return json.loads(Path(f"{prefix}.json").read_text())


def outcome(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES}
