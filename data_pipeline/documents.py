"""The document record and its JSONL form: one `{"id", "text", "domain"}` object a line, UTF-8."""

import dataclasses
import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.config import PipelineError


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One training document."""

    id: str
    """Unique within a corpus, e.g. `prose/asyncio/events.py`."""
    text: str
    """Empty where `messages` hold the content."""
    domain: str
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    messages: list[dict[str, Any]] | None = None
    """Turns of a conversation, `{"role": ..., "content": ...}`; None for plain text."""


def expand_glob(pattern: str) -> list[Path]:
    """Return the files that match `pattern`, sorted by name; at least one."""
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))
    files = [path for path in paths if path.is_file()]
    if not files:
        raise PipelineError(f"input={pattern} matches no file; give a JSONL file or a quoted glob")
    return files


def read_documents(path: Path) -> Iterator[Document]:
    """Yield the documents of a JSONL file in order.

    Raises:
        PipelineError: names the file and the 1-based line of anything that is not a document.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise PipelineError(
                    f"{path}:{number} is not JSON ({error}); one object a line is expected"
                ) from None
            yield _document(record, f"{path}:{number}")


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Write a JSONL file under a temporary name, then rename it into place."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="\n") as stream:
        for document in documents:
            stream.write(json.dumps(_record(document), ensure_ascii=False) + "\n")
    partial.replace(path)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON with sorted keys under a temporary name, then rename it into place."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the bytes of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _record(document: Document) -> dict[str, Any]:
    """Return the fields of a document without the optional ones that are empty."""
    return {
        key: value for key, value in dataclasses.asdict(document).items() if value or key == "text"
    }


def _document(record: object, where: str) -> Document:
    if not isinstance(record, dict):
        raise PipelineError(f"{where} is a {type(record).__name__}; an object is expected")
    for key in ("id", "text", "domain"):
        if not isinstance(record.get(key), str):
            raise PipelineError(
                f"{where}: {key!r} is {record.get(key)!r}; a string is expected: "
                'write {"id": ..., "text": ..., "domain": ...}'
            )
    return Document(record["id"], record["text"], record["domain"])
