"""Reading: ids are unique, and what is no document is counted or refused with its place."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.config import PipelineError
from data_pipeline.curation.arguments import Curate
from data_pipeline.curation.chain import curate
from tests.unit.data_pipeline.curation.corpora import kept, kept_ids, reasons

TEXT = "A sentence of some length."


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def curated(folder: Path, source: str, **more: Any) -> Any:
    curate(Curate(input=source, output=str(folder / "out"), steps={"length": {}}, **more))
    return json.loads((folder / "out" / "curation.json").read_text())


def two_files(folder: Path) -> str:
    """Return a glob of two files that share an id; texts tell the documents apart."""
    names = [["x", "y", "z"], ["w", "y", "v", "x"]]
    for number, ids in enumerate(names):
        records = [{"id": name, "text": f"{name} of {number}"} for name in ids]
        (folder / f"part{number}.jsonl").write_text(lines(*records))
    return str(folder / "part*.jsonl")


def test_a_duplicate_id_is_refused_with_both_places(tmp_path: Path) -> None:
    with pytest.raises(
        PipelineError, match=r"part1.jsonl, document 2: id 'y' .*part0.jsonl, document 2; make"
    ):
        curated(tmp_path, two_files(tmp_path), block_documents=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("block_documents", [1, 2, 100])
def test_a_duplicate_id_can_be_counted(tmp_path: Path, block_documents: int) -> None:
    source = two_files(tmp_path)
    report = curated(tmp_path, source, on_error="skip", block_documents=block_documents)
    assert reasons(report) == {"read: duplicate_id": 2}
    assert [document.text for document in kept(tmp_path)] == [
        *("x of 0", "y of 0", "z of 0", "w of 1", "v of 1"),
    ]
    dropped = (tmp_path / "out" / "dropped" / "read.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in dropped] == ["y", "x"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (json.dumps({"id": "b", "text": 3}), "no_text"),
        (json.dumps({"id": "", "text": TEXT}), "bad_id"),
        ('{"id": "b", "text": "half a pair \\ud800"}', "invalid_json"),
        ('{"id": "b", "text": ', "invalid_json"),
    ],
)
def test_what_is_no_document_is_refused_or_counted(
    tmp_path: Path, record: str, reason: str
) -> None:
    path = tmp_path / "part.jsonl"
    path.write_text(lines({"id": "a", "text": TEXT}) + record + "\n")
    with pytest.raises(PipelineError, match=rf"part.jsonl:2 .*\[{reason}\]"):
        curated(tmp_path, str(path))
    assert not (tmp_path / "out").exists()
    report = curated(tmp_path, str(path), on_error="skip")
    assert report["skipped"] == {reason: 1}
    assert kept_ids(tmp_path) == ["a"]


def test_metadata_that_json_cannot_hold_is_refused_or_counted(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    columns = {"id": ["a", "b"], "text": [TEXT, TEXT], "picture": [None, b"png"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(PipelineError, match=r"part.parquet:2 holds what JSON cannot"):
        curated(tmp_path, str(path))
    assert curated(tmp_path, str(path), on_error="skip")["skipped"] == {"not_json": 1}


def test_an_empty_document_is_counted_and_no_document_refused(tmp_path: Path) -> None:
    path = tmp_path / "part.jsonl"
    path.write_text(lines({"id": "a", "text": ""}))
    with pytest.raises(PipelineError, match=r"no input has a document \({'empty': 1}\)"):
        curated(tmp_path, str(path))
    path.write_text(lines({"id": "a", "text": ""}, {"id": "b", "text": TEXT}))
    assert curated(tmp_path, str(path))["skipped"] == {"empty": 1}


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    data = gzip.compress(lines(*({"id": str(n), "text": TEXT * n} for n in range(99))).encode())
    (tmp_path / "part.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(PipelineError, match=r"part.jsonl.gz.*\[truncated\]"):
        curated(tmp_path, str(tmp_path / "part.jsonl.gz"))
    assert not (tmp_path / "out").exists()


def test_files_of_the_same_name_in_two_trees_are_two_documents(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "readme.txt").write_text(f"{TEXT} {folder}")
    report = curated(tmp_path, f"{tmp_path / 'one'},{tmp_path / 'two'}")
    assert sorted(kept_ids(tmp_path)) == ["one/readme.txt", "two/readme.txt"]
    assert [part["documents"] for part in report["inputs"]] == [1, 1]


def test_domains_may_be_any_name(tmp_path: Path) -> None:
    names = ["en/wiki", "..", "a b", "CON", "\u00e9"]
    path = tmp_path / "part.jsonl"
    path.write_text(lines(*({"id": n, "text": TEXT, "domain": n} for n in names)))
    report = curated(tmp_path, str(path))
    assert sorted(kept_ids(tmp_path)) == sorted(names)
    assert {record["domain"] for record in report["files"]} == set(names)
    assert {path.parent for path in (tmp_path / "out").rglob("*.jsonl")} == {tmp_path / "out"}
