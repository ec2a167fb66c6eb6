"""A small tokenizer, and a folder of it for each shape of template."""

import json
import random
from pathlib import Path

import pytest

from data_pipeline.train_tokenizer import TrainTokenizer, train_tokenizer
from tests.unit.data_pipeline.chat.shapes import LING, NUM_TOKENS, SHAPES, write_lines, write_shape


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shape -> folder; their merges join newlines, as those of real vocabularies do."""
    root = tmp_path_factory.mktemp("shapes")
    rng = random.Random(0)
    words = ["".join(rng.choices("abc 12\n", k=rng.randrange(2, 6))) for _ in range(300)]
    texts = ["\n\n".join(rng.choices(words, k=30)) for _ in range(300)]
    records = [{"id": str(n), "text": text, "domain": "d"} for n, text in enumerate(texts)]
    write_lines(root / "text.jsonl", records)
    base = root / "base"
    arguments = {"input": str(root / "text.jsonl"), "output": str(base)}
    train_tokenizer(TrainTokenizer(vocab_size=NUM_TOKENS, **arguments))
    return {name: write_shape(base, root / name, text) for name, (text, _) in SHAPES.items()}


@pytest.fixture(scope="session")
def ling(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the released Ling 2.0 template."""
    if not LING.is_file():
        pytest.skip("the released Ling 2.0 template is not beside this checkout")
    template = json.loads(LING.read_text())["chat_template"]
    return write_shape(folders["ours"], tmp_path_factory.mktemp("ling") / "ling", template)
