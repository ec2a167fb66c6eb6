"""Small corpora of real text, and curations of them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from data_pipeline.curation.arguments import Curate, Dropped
from data_pipeline.curation.chain import curate
from data_pipeline.documents import Document, write_documents
from data_pipeline.sources import read_source


def prose(count: int | None = None) -> list[Document]:
    """Return topics of Python's help: real English prose, all different."""
    names = sorted(topics, key=lambda name: (len(topics[name]) > 6000, name))[:count]
    return [Document(f"topic/{name}", topics[name], "prose") for name in names]


def write_corpus(folder: Path, documents: Iterable[Document]) -> str:
    """Write documents to a file and return its path."""
    path = folder / "corpus.jsonl"
    write_documents(path, documents)
    return str(path)


def curated(folder: Path, documents: Iterable[Document], steps: dict[str, Any], **more: Any) -> Any:
    """Curate documents in this process and return the report."""
    source = write_corpus(folder, documents)
    arguments: dict[str, Any] = {"output": str(folder / "out"), "dropped": Dropped.text, **more}
    curate(Curate(input=source, steps=steps, **arguments))
    return json.loads((Path(arguments["output"]) / "curation.json").read_text())


def kept(folder: Path) -> list[Document]:
    """Return the curated documents, domain by domain."""
    files = sorted((folder / "out").glob("*.jsonl*"))
    return [document for path in files for document in read_source(str(path))]


def kept_ids(folder: Path) -> list[str]:
    """Return the ids of the curated documents."""
    return [document.id for document in kept(folder)]


def drops(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the dropped documents that were written out."""
    for path in sorted((folder / "out" / "dropped").glob("*.jsonl")):
        yield from map(json.loads, path.read_text().splitlines())


def reasons(report: Any) -> dict[str, int]:
    """Return `step: reason` -> documents."""
    found: dict[str, int] = {}
    for row in report["dropped"]:
        key = f"{row['step']}: {row['reason']}"
        found[key] = found.get(key, 0) + row["documents"]
    return found
