"""JSONL documents."""

from pathlib import Path

import pytest

from data_pipeline.config import PipelineError
from data_pipeline.documents import Document, expand_glob, read_documents, write_documents

DOCUMENTS = [Document("a", "two\nlines \u00e9\u2028", "code"), Document("b", "", "prose")]


def test_documents_survive_a_round_trip(tmp_path: Path) -> None:
    write_documents(tmp_path / "x.jsonl", DOCUMENTS)
    assert list(read_documents(tmp_path / "x.jsonl")) == DOCUMENTS
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "x.jsonl:2 is not JSON"),
        ('["list"]', "x.jsonl:2 is a list"),
        ('{"id": "b", "domain": "code"}', "x.jsonl:2: 'text' is None"),
        ('{"id": 7, "text": "t", "domain": "code"}', "x.jsonl:2: 'id' is 7"),
        ("", "x.jsonl:2 is not JSON"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    good = '{"id": "a", "text": "t", "domain": "code"}'
    (tmp_path / "x.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(PipelineError, match=message):
        list(read_documents(tmp_path / "x.jsonl"))


def test_invalid_utf8_is_refused_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"id": "a", "text": "\xff", "domain": "code"}\n')
    with pytest.raises(PipelineError, match=r"x.jsonl:1 is not JSON"):
        list(read_documents(tmp_path / "x.jsonl"))


def test_a_glob_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="matches no file"):
        expand_glob(str(tmp_path / "*.jsonl"))
