import dataclasses
import shutil
from itertools import islice
from pathlib import Path

from ring_train.config import ModelConfig
from ring_train.hf.certificate.prompts import LENGTHS, PAST_CONTEXT_TOKENS, certificate_rows
from tests.unit.hf.conftest import GOLDEN


def test_rows_are_the_same_ids_every_time_and_within_the_vocabulary(tiny: ModelConfig) -> None:
    rows, others = certificate_rows(GOLDEN / "ling_v2", tiny)
    assert [len(row) for row in rows] == list(LENGTHS)
    assert rows == certificate_rows(GOLDEN / "ling_v2", tiny)[0]
    assert list(islice(others, 63)) not in rows
    assert all(0 <= token < tiny.vocab_size for row in rows for token in row)


def test_rows_pass_the_context_that_yarn_stretches(tiny: ModelConfig) -> None:
    def lengths(context: int) -> list[int]:
        model = dataclasses.replace(
            tiny, rotary_scaling_factor=4.0, original_max_position_embeddings=context
        )
        return [len(row) for row in certificate_rows(GOLDEN / "ling_v2", model)[0]]

    assert lengths(64) == [*LENGTHS, 64 + PAST_CONTEXT_TOKENS]
    assert lengths(32768) == list(LENGTHS)


def test_a_tokenizer_with_hardly_any_ids_gives_drawn_ones(
    tiny: ModelConfig, tmp_path: Path
) -> None:
    import json

    shutil.copytree(GOLDEN / "ling_v2", tmp_path / "x")
    path = tmp_path / "x" / "tokenizer.json"
    path.chmod(0o644)
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] = dict(list(tokenizer["model"]["vocab"].items())[:2])
    tokenizer["model"]["merges"] = []
    path.write_text(json.dumps(tokenizer))
    rows, _ = certificate_rows(tmp_path / "x", tiny)
    path.write_text("no JSON")
    assert certificate_rows(tmp_path / "x", tiny)[0] == rows
    assert len({token for row in rows for token in row}) > 100
