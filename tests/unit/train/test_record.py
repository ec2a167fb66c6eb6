"""A resumed run is warned of values that change what it finds, and of no others."""

import logging
from pathlib import Path

import pytest

from ring_train.config import compose, to_yaml
from ring_train.train.record import _warn_of_changes

WORDS = ["model=tiny", "evaluation.problems.math=a.jsonl"]


@pytest.mark.parametrize(
    ("word", "is_named"),
    [
        ("evaluation.interval_steps=7", False),
        ("evaluation.max_batch_size=7", False),
        ("evaluation.problems.math=b.jsonl", True),
        ("evaluation.temperature=0", True),
        ("evaluation.template_arguments.enable_thinking=true", True),
        ("evaluation.instruction=x", True),
    ],
)
def test_values_that_change_an_evaluation_are_named(
    word: str, is_named: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(compose("pretrain", WORDS)))
    with caplog.at_level(logging.WARNING):
        _warn_of_changes(path, compose("pretrain", [*WORDS, word]))
    assert [word.partition("=")[0] in record.message for record in caplog.records] == [
        True
    ] * is_named
