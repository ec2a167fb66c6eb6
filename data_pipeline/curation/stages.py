"""Files between two passes: one JSONL file per block of documents, with its tally beside it.

The tally is renamed into place last: a block that has one is whole, whenever the run was killed.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from data_pipeline.curation.tally import Tally
from data_pipeline.documents import Document

REMOVALS_DTYPE = "<u4"
"""Positions in a block, ascending: datatrove's file format of documents to remove."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """The folder of one pass."""

    folder: Path

    def block(self, number: int) -> Path:
        """Return the path of a block's documents."""
        return self.folder / "blocks" / f"{number:06d}.jsonl"

    def dropped(self, number: int) -> Path:
        """Return the path of what the pass dropped of a block."""
        return self.folder / "dropped" / f"{number:06d}.jsonl"

    def pieces(self, number: int) -> Path:
        """Return the folder of a block's finished documents, one file per domain."""
        return self.folder / "pieces" / f"{number:06d}"

    def tally(self, number: int) -> Path:
        """Return the path whose existence says that the block is whole."""
        return self.folder / "tallies" / f"{number:06d}.json"

    @property
    def signatures(self) -> Path:
        """The folder of what the next step over the whole corpus compares."""
        return self.folder / "signatures"

    @property
    def duplicates(self) -> Path:
        """The folder of what that step found."""
        return self.folder / "duplicates"

    @property
    def done(self) -> Path:
        """The path whose existence says that the whole pass is finished."""
        return self.folder / "done.json"

    def make_folders(self) -> None:
        """Create what blocks are written to."""
        for name in ("blocks", "dropped", "tallies"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)


def document_line(document: Document) -> bytes:
    """Return a document as one line of JSON, without the optional fields that are empty."""
    record: dict[str, Any] = {
        "id": document.id,
        "text": document.text,
        "domain": document.domain,
    }
    if document.metadata:
        record["metadata"] = document.metadata
    if document.messages is not None:
        record["messages"] = document.messages
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def read_block(path: Path) -> Iterator[Document]:
    """Yield the documents of a block in order."""
    with path.open("rb") as stream:
        for line in stream:
            yield Document(**orjson.loads(line))


def length_bin(length: int) -> int:
    """Return the half octave of a length: bin k holds 2**(k/2) up to 2**((k+1)/2) characters."""
    return int(2 * math.log2(max(length, 1)))


def write_tally(path: Path, tally: Tally) -> None:
    """Write a tally under a temporary name, then rename it into place."""
    write_record(path, tally.to_json())


def read_tally(path: Path) -> Tally:
    """Return the tally that `write_tally` wrote."""
    return Tally.from_json(orjson.loads(path.read_bytes()))


def write_record(path: Path, content: object) -> None:
    """Write compact JSON under a temporary name, then rename it into place."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(orjson.dumps(content))
    partial.replace(path)


class DroppedWriter:
    """Lines of {id, domain, step, reason, ...} for what is dropped, if anyone asked for them."""

    def __init__(self, stream: BinaryIO | None, *, with_text: bool) -> None:
        self._stream = stream
        self._with_text = with_text

    def write(self, document: Document, step: str, reason: str, detail: str = "") -> None:
        """Write one dropped document."""
        if self._stream is None:
            return
        record: dict[str, Any] = {
            "id": document.id,
            "domain": document.domain,
            "step": step,
            "reason": reason,
        }
        if detail:
            record["detail"] = detail
        if self._with_text:
            record["text"] = document.text
            if document.messages is not None:
                record["messages"] = document.messages
        self._stream.write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))
