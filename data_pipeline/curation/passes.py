"""Passes over the corpus: each drops what the last search found, applies rules, and signs.

A step over the whole corpus ends a pass: the documents that reach it are signed, the signatures are
searched, and the next pass drops what was found. Blocks of a pass are independent; their number and
content depend on the input alone, so the result does not depend on the number of workers.
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

import zstandard

from data_pipeline.config import PipelineError
from data_pipeline.curation.duplicates import REASONS, read_removals, write_signatures
from data_pipeline.curation.nodes import WHOLE_CORPUS, Step
from data_pipeline.curation.rules import Drop, Rule, build_rule, characters
from data_pipeline.curation.stages import (
    DroppedWriter,
    Stage,
    document_line,
    length_bin,
    read_block,
    write_tally,
)
from data_pipeline.curation.tally import Tally
from data_pipeline.documents import Document

ZSTD_LEVEL = 3
DUPLICATE_ID = "duplicate_id"
"""Reason of the drops of the step `read`."""


@dataclasses.dataclass(frozen=True, slots=True)
class NamedStep:
    """A step under the name that reports use."""

    name: str
    step: Step


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What one pass does, and where."""

    source: Stage
    """Whose blocks are read, and whose duplicates are dropped."""
    stage: Stage
    """Written."""
    removal: NamedStep | None
    """Step over the whole corpus that searched `source`; None for duplicate ids."""
    rules: tuple[NamedStep, ...]
    signed_for: NamedStep | None
    """Step over the whole corpus that comes next; None for the last pass."""
    write_dropped: bool
    with_text: bool
    zstd: bool
    """Compress the finished documents."""


def split_passes(steps: Iterable[NamedStep]) -> list[tuple[list[NamedStep], NamedStep | None]]:
    """Return (rules, the step over the whole corpus that ends them) of each pass."""
    passes: list[tuple[list[NamedStep], NamedStep | None]] = []
    rules: list[NamedStep] = []
    for named in steps:
        if isinstance(named.step, WHOLE_CORPUS):
            passes.append((rules, named))
            rules = []
        else:
            rules.append(named)
    return [*passes, (rules, None)]


def prepared_folder(stage: Stage, named: NamedStep) -> Path:
    """Return where the index of a step lies."""
    return stage.folder / "prepared" / quote(named.name, safe="")


def run_block(task: Pass, number: int) -> None:
    """Do one block of a pass; afterwards its tally exists. A block that has one is left alone."""
    stage = task.stage
    if stage.tally(number).exists():
        return
    tally = Tally()
    with contextlib.ExitStack() as stack:
        stream = None
        if task.write_dropped:
            stream = stack.enter_context(stage.dropped(number).open("wb"))
        dropped = DroppedWriter(stream, with_text=task.with_text)
        documents = _passing(task, number, tally, dropped)
        if task.signed_for is None:
            _write_pieces(task, number, documents, tally)
        else:
            block = stack.enter_context(stage.block(number).open("wb"))
            copied = _copied(documents, block)
            write_signatures(task.signed_for.step, stage, number, copied)
    write_tally(stage.tally(number), tally)


def _passing(task: Pass, number: int, tally: Tally, dropped: DroppedWriter) -> Iterator[Document]:
    """Yield the documents of a block that pass, and count and write out the others."""
    rules = _rules(task)
    for document in _remaining(task, number, tally, dropped):
        passing = document
        for name, rule in rules:
            verdict = _verdict(rule, passing, name)
            if isinstance(verdict, Drop):
                _drop(passing, name, verdict, tally, dropped)
                break
            removed = characters(passing) - characters(verdict)
            if verdict is not passing and verdict != passing:
                tally.add(("edited", name, passing.domain), removed)
            passing = verdict
        else:
            yield passing


def _remaining(task: Pass, number: int, tally: Tally, dropped: DroppedWriter) -> Iterator[Document]:
    """Yield the documents of a block without those that the last search found."""
    name, step = (task.removal.name, task.removal.step) if task.removal else ("read", None)
    reason = REASONS[type(step)] if step else DUPLICATE_ID
    domains = step.domains if step else []
    removals = set(read_removals(step, task.source, number).tolist())
    num_seen = num_dropped = 0
    for document in read_block(task.source.block(number)):
        if domains and document.domain not in domains:
            yield document
            continue
        if num_seen in removals:
            _drop(document, name, Drop(reason), tally, dropped)
            num_dropped += 1
        else:
            yield document
        num_seen += 1
    assert num_dropped == len(removals), f"{name}: positions beyond block {number}"


def _drop(document: Document, name: str, drop: Drop, tally: Tally, dropped: DroppedWriter) -> None:
    tally.add(("dropped", name, drop.reason, document.domain), characters(document))
    dropped.write(document, name, drop.reason, drop.detail)


def _verdict(rule: Rule, document: Document, name: str) -> Document | Drop:
    try:
        return rule(document)
    except PipelineError as error:
        raise PipelineError(f"steps.{name}, document {document.id!r}: {error}") from None
    except (ArithmeticError, ValueError, LookupError) as error:
        raise PipelineError(
            f"steps.{name}, document {document.id!r}: datatrove fails with "
            f"{type(error).__name__}: {error}; drop such documents by an earlier step"
        ) from error


def _rules(task: Pass) -> list[tuple[str, Rule]]:
    return [(n.name, build_rule(n.step, prepared_folder(task.stage, n))) for n in task.rules]


def _copied(documents: Iterable[Document], stream: BinaryIO) -> Iterator[Document]:
    """Yield the documents unchanged and write each."""
    for document in documents:
        stream.write(document_line(document))
        yield document


def _write_pieces(task: Pass, number: int, documents: Iterable[Document], tally: Tally) -> None:
    """Write the documents to one file per domain and count them as kept, with their lengths."""
    folder = task.stage.pieces(number)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        streams: dict[str, BinaryIO] = {}
        for document in documents:
            domain, length = document.domain, characters(document)
            if domain not in streams:
                stream = stack.enter_context((folder / piece_name(domain)).open("wb"))
                if task.zstd:
                    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
                    stream = stack.enter_context(compressor.stream_writer(stream))
                streams[domain] = stream
            streams[domain].write(document_line(document))
            tally.add(("kept", domain), length)
            tally.add(("kept_length", str(length_bin(length)), domain), length)


def piece_name(domain: str) -> str:
    """Return a file name for a domain: reversible, whatever its characters."""
    return quote(domain, safe=" ") if domain not in ("", ".", "..") else f"%{domain}"
