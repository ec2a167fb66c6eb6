"""What every source yields, rows and faults, and how a record becomes a document.

A source reads forward and yields `Row` for what can be used and `Fault` for what cannot; the
consumer decides by `SourceOptions.on_error` whether a fault ends the command or is counted.
"""

import dataclasses
import logging
from collections import Counter
from typing import Any

from data_pipeline.config import PipelineError
from data_pipeline.documents import Document

logger = logging.getLogger(__name__)

MEBIBYTE = 2**20
COUNTED_REASONS = ("empty", "binary", "dropped_long")
"""No fault of the data: an empty text, a binary file in a source tree, a sample that is longer than
the user wants."""
MESSAGES_KEY = "messages"
NUM_LOGGED_FAULTS = 5
"""Faults of one reason that are logged one by one; the rest is counted only."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """How records are read."""

    text_key: str = "text"
    id_key: str = "id"
    """A record without it is called NAME:NUMBER, its file and 1-based line or row."""
    domain_key: str = "domain"
    domain: str = ""
    """Of records that name none; empty: the stem of the file's name."""
    on_error: str = "refuse"
    """`refuse`: the first fault ends the command. `skip`: faults are counted by reason."""
    max_document_bytes: int = 64 * MEBIBYTE
    """A longer line or file is a fault, met without holding it in memory."""
    text_only: bool = False
    """Columns other than text and id need not be read."""
    messages: bool = False
    """Records are conversations: a list `messages` is wanted, and text is not."""

    def __post_init__(self) -> None:
        if self.on_error not in ("refuse", "skip"):
            raise PipelineError(f"on_error={self.on_error} is unknown; choose refuse or skip")
        if self.max_document_bytes < 1:
            raise PipelineError(f"max_document_bytes={self.max_document_bytes} must be positive")


@dataclasses.dataclass(slots=True)
class Row:
    """A record with text or messages; neither is checked for being empty."""

    number: int
    """1-based line or row, from the start of its block."""
    id: str | None
    """None where the record has none: `name_of` makes one."""
    text: str
    record: dict[str, Any]


@dataclasses.dataclass(slots=True)
class Fault:
    """Something in a source that is no document."""

    reason: str
    """A short word, the key it is counted under."""
    number: int
    """1-based line or row, from the start of its block."""
    detail: str
    count: int = 1
    """Records lost; 1 where nobody can tell."""


class FaultTally:
    """Counts what was skipped, and refuses it if that was asked."""

    def __init__(self, options: SourceOptions, counts: dict[str, int] | None = None) -> None:
        self._options = options
        self.counts: Counter[str] = Counter(counts or {})

    def add(self, fault: Fault, where: str) -> None:
        """Count a fault at `where` (file and line).

        Raises:
            PipelineError: on_error is refuse, and its reason is not in COUNTED_REASONS.
        """
        if fault.reason in COUNTED_REASONS:
            self.counts[fault.reason] += fault.count
            return
        if self._options.on_error == "refuse":
            raise PipelineError(
                f"{where} {fault.detail} [{fault.reason}]; repair it, or give on_error=skip to "
                "count such records and go on"
            )
        self.counts[fault.reason] += fault.count
        if self.counts[fault.reason] <= NUM_LOGGED_FAULTS:
            logger.warning("skipped: %s %s [%s]", where, fault.detail, fault.reason)


def row_of(record: object, number: int, options: SourceOptions) -> Row | Fault:
    """Return the row of a parsed record, or why it is none."""
    if not isinstance(record, dict):
        return Fault("not_an_object", number, f"is a {type(record).__name__}, not an object")
    text = "" if options.messages else record.get(options.text_key)
    messages = record.get(MESSAGES_KEY)
    if options.messages and not isinstance(messages, list):
        detail = f"has {MESSAGES_KEY!r}: {messages!r:.60}, not a list of messages"
        return Fault("no_messages", number, detail)
    if not isinstance(text, str):
        if text is not None or not isinstance(messages, list):
            return Fault("no_text", number, f"has {options.text_key!r}: {text!r:.60}, not a string")
        text = ""
    identifier = record.get(options.id_key)
    if type(identifier) is int:
        identifier = str(identifier)
    if identifier is not None and (not isinstance(identifier, str) or not identifier):
        return Fault("bad_id", number, f"has {options.id_key!r}: {identifier!r:.60}, no name")
    if "\0" in text:
        return Fault("nul", number, f"has a NUL character at {text.index(chr(0))} of its text")
    return Row(number, identifier, text, record)


def name_of(row: Row, source: str, first_number: int) -> str:
    """Return the id of a row: its own, or NAME:NUMBER."""
    return row.id if row.id is not None else f"{source}:{first_number + row.number}"


def document_of(row: Row, name: str, options: SourceOptions, stem: str) -> Document:
    """Return the document of a row; what is neither id, text nor domain becomes metadata."""
    used = {options.id_key, options.text_key, options.domain_key, MESSAGES_KEY, "metadata"}
    domain = row.record.get(options.domain_key)
    metadata = {key: value for key, value in row.record.items() if key not in used}
    if isinstance(row.record.get("metadata"), dict):
        metadata |= row.record["metadata"]
    return Document(
        id=name,
        text=row.text,
        domain=domain if isinstance(domain, str) and domain else options.domain or stem,
        metadata=metadata,
        messages=row.record.get(MESSAGES_KEY) if not row.text else None,
    )
