"""Decontamination against evaluation sets of local files."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import PipelineError
from data_pipeline.curation.arguments import Curate
from data_pipeline.curation.chain import curate
from data_pipeline.documents import Document
from tests.unit.data_pipeline.curation.corpora import (
    curated,
    drops,
    kept_ids,
    prose,
    reasons,
    write_corpus,
)

ITEM = {
    "id": "q1",
    "question": "A train leaves the old station at nine and travels along the river until noon,",
    "answer": "so it has been under way for exactly three hours when it stops again.",
    "points": 4,
}


def evaluation(folder: Path, *items: Any, name: str = "trains") -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def decontaminated(folder: Path, documents: list[Document], **step: Any) -> Any:
    return curated(folder, documents, {"evals": {"step": "decontaminate", **step}})


def planted(text: str) -> list[Document]:
    documents = prose(10)
    half = documents[4].text[:300]
    documents[4] = Document("planted", f"{half} {text} {half}", "prose")
    return documents


@pytest.mark.parametrize(
    "text",
    [
        ITEM["question"],
        str(ITEM["answer"]).upper().replace(" ", "\n"),
        "until noon -- so it has been under way for exactly three hours when it",
    ],
)
def test_a_planted_item_is_found_however_it_is_set(tmp_path: Path, text: str) -> None:
    report = decontaminated(tmp_path, planted(text), evaluation=evaluation(tmp_path, ITEM))
    assert reasons(report) == {"evals: contaminated: trains": 1}
    assert "planted" not in kept_ids(tmp_path)
    assert len(kept_ids(tmp_path)) == 9
    (record,) = drops(tmp_path)
    assert record["id"] == "planted"
    assert len(record["detail"].split()) == 12


def test_fewer_words_in_a_row_than_asked_for_are_no_match(tmp_path: Path) -> None:
    text = " ".join(str(ITEM["question"]).split()[:11])
    report = decontaminated(tmp_path, planted(text), evaluation=evaluation(tmp_path, ITEM))
    assert not reasons(report)


def test_only_the_named_fields_are_looked_for(tmp_path: Path) -> None:
    path = evaluation(tmp_path, ITEM)
    report = decontaminated(
        tmp_path, planted(str(ITEM["answer"])), evaluation=path, fields=["question"]
    )
    assert not reasons(report)


def test_the_first_set_that_is_found_is_the_reason(tmp_path: Path) -> None:
    other = {"text": " ".join(prose(3)[2].text.split()[:60])}
    evaluation(tmp_path, ITEM)
    evaluation(tmp_path, other, name="help")
    steps = {
        "normalize": {},
        "trains": {"step": "decontaminate", "evaluation": str(tmp_path / "trains.jsonl")},
        "help": {"step": "decontaminate", "evaluation": str(tmp_path / "help.jsonl")},
    }
    report = curated(tmp_path, planted(str(ITEM["question"])), steps)
    assert reasons(report) == {"trains: contaminated: trains": 1, "help: contaminated: help": 1}


def test_items_too_short_to_be_found_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = evaluation(tmp_path, ITEM, {"question": "Why?"})
    with caplog.at_level(logging.WARNING):
        decontaminated(tmp_path, prose(2), evaluation=path)
    assert "1 of 2 items have fewer than 12 words" in caplog.text


@pytest.mark.parametrize(
    ("lines", "step", "message"),
    [
        ('{"text": "too short"}\n', {}, r"none of 1 items has 12 words; lower n_grams"),
        ("not json\n", {}, r"trains.jsonl:1 is not JSON"),
        ("[1]\n", {}, r"trains.jsonl:1 is a list"),
        ('{"number": 3}\n', {}, r"trains.jsonl:1 has no string"),
        ('{"a": "b"}\n', {"fields": ["q"]}, r"trains.jsonl:1: 'q' is no string; the item has a"),
    ],
)
def test_bad_evaluation_files_are_refused(
    tmp_path: Path, lines: str, step: dict[str, Any], message: str
) -> None:
    path = tmp_path / "trains.jsonl"
    path.write_text(lines)
    with pytest.raises(PipelineError, match=message):
        decontaminated(tmp_path, prose(2), evaluation=str(path), **step)
    assert not (tmp_path / "out").exists()


def test_a_changed_evaluation_set_is_another_curation(tmp_path: Path) -> None:
    path = evaluation(tmp_path, ITEM)
    config = Curate(
        input=write_corpus(tmp_path, prose(2)),
        output=str(tmp_path / "out"),
        steps={"decontaminate": {"evaluation": path}},
    )
    curate(config)
    curate(config)
    evaluation(tmp_path, ITEM, {"text": prose(1)[0].text})
    with pytest.raises(PipelineError, match="not the result of these steps"):
        curate(config)
