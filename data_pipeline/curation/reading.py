"""The documents of a curation's input, cut into blocks; ids are made sure to be unique.

Memory: 8 bytes a document while reading, twice that while ids are compared.
"""

import bisect
import dataclasses
import hashlib
import itertools
import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import xxhash

from data_pipeline.config import PipelineError
from data_pipeline.curation.duplicates import write_removals
from data_pipeline.curation.rules import characters
from data_pipeline.curation.stages import (
    Stage,
    document_line,
    length_bin,
    read_block,
    write_record,
    write_tally,
)
from data_pipeline.curation.tally import Tally
from data_pipeline.documents import Document, file_sha256
from data_pipeline.sources import (
    MEBIBYTE,
    Fault,
    FaultTally,
    Input,
    SourceOptions,
    document_of,
    name_of,
    plan_blocks,
)
from data_pipeline.sources import read_block as read_source_block
from data_pipeline.sources.inputs import walk_files

SOURCE_BLOCK_BYTES = 4 * MEBIBYTE
BLOCK_CHARACTERS = 128 * MEBIBYTE
"""A block ends here even if it has fewer documents than asked for."""


@dataclasses.dataclass(frozen=True, slots=True)
class Corpus:
    """What reading left behind."""

    num_blocks: int
    skipped: dict[str, int]
    """Records that are no documents, by reason."""
    inputs: list[dict[str, object]]


def read_corpus(
    inputs: list[Input], options: SourceOptions, stage: Stage, block_documents: int
) -> Corpus:
    """Write the documents of all inputs to blocks, unless a finished run already did.

    Duplicate ids are refused, or with on_error=skip left for the first pass to drop.

    Raises:
        PipelineError: a fault or a duplicate id that is not to be skipped; there is no document.
    """
    if stage.done.exists():
        return Corpus(**orjson.loads(stage.done.read_bytes()))
    stage.make_folders()
    faults = FaultTally(options)
    index = _IdIndex(inputs)
    located = _located_documents(inputs, options, faults, index)
    num_blocks = 0
    while _write_block(stage, num_blocks, itertools.islice(located, block_documents), index):
        num_blocks += 1
    if not num_blocks:
        raise PipelineError(
            f"{inputs[0].path}: no input has a document ({dict(faults.counts) or 'no records'})"
        )
    _mark_duplicate_ids(stage, index, refuse=options.on_error == "refuse")
    records: list[dict[str, object]] = [
        {"documents": n, "name": part.name, "sha256": input_sha256(part)}
        for part, n in zip(inputs, index.documents_by_input(), strict=True)
    ]
    corpus = Corpus(num_blocks, dict(faults.counts), records)
    write_record(stage.done, dataclasses.asdict(corpus))
    return corpus


def input_sha256(part: Input) -> str | None:
    """Return the hash of a file, or of the names and hashes of a folder; None for a hub id."""
    path = Path(part.path.partition(":")[0] if part.kind == "hf" else part.path)
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in map(Path, walk_files(str(path))):
        digest.update(f"{file.relative_to(path)}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


class _IdIndex:
    """Hashes of the ids in order, and which input and block each document is from."""

    def __init__(self, inputs: list[Input]) -> None:
        self._inputs = inputs
        self.hashes = array("Q")
        self.block_starts: list[int] = []
        self._input_starts: list[int] = []

    def begin_input(self) -> None:
        self._input_starts.append(len(self.hashes))

    def add(self, document: Document) -> None:
        self.hashes.append(xxhash.xxh64_intdigest(document.id.encode()))

    def documents_by_input(self) -> list[int]:
        bounds = [*self._input_starts, len(self.hashes)]
        return [stop - start for start, stop in itertools.pairwise(bounds)]

    def place(self, position: int) -> tuple[int, int]:
        """Return (block, position in it) of a document."""
        block = bisect.bisect_right(self.block_starts, position) - 1
        return block, position - self.block_starts[block]

    def where(self, position: int) -> str:
        """Return the file and the 1-based number of a document in it."""
        number = bisect.bisect_right(self._input_starts, position) - 1
        return f"{self._inputs[number].path}, document {position - self._input_starts[number] + 1}"


def _located_documents(
    inputs: list[Input], options: SourceOptions, faults: FaultTally, index: _IdIndex
) -> Iterator[tuple[Document, bytes]]:
    """Yield documents and their JSON; what has no text or no JSON is counted as a fault."""
    for part in inputs:
        index.begin_input()
        num_read = 0
        for block in plan_blocks(part, options, SOURCE_BLOCK_BYTES):
            items, count = read_source_block(block, options)
            for item in items:
                where = f"{part.path}:{num_read + item.number}"
                if isinstance(item, Fault):
                    faults.add(item, where)
                    continue
                name = name_of(item, part.name, num_read)
                if part.kind == "tree" and len(inputs) > 1:
                    name = f"{part.name}/{name}"  # its own are relative to the tree
                document = document_of(item, name, options, part.stem)
                if not characters(document):
                    faults.add(Fault("empty", item.number, "is empty"), where)
                elif (line := _line(document)) is None:
                    faults.add(Fault("not_json", item.number, "holds what JSON cannot"), where)
                else:
                    yield document, line
            num_read += count


def _line(document: Document) -> bytes | None:
    """Return the JSON of a document, or None if its metadata holds bytes or the like."""
    try:
        return document_line(document)
    except TypeError:
        return None


def _write_block(
    stage: Stage, number: int, documents: Iterator[tuple[Document, bytes]], index: _IdIndex
) -> bool:
    """Write the next block and return whether there was anything to write."""
    first = next(documents, None)
    if first is None:
        return False
    index.block_starts.append(len(index.hashes))
    tally = Tally()
    num_characters = 0
    with stage.block(number).open("wb") as stream:
        for document, line in itertools.chain([first], documents):
            index.add(document)
            stream.write(line)
            length = characters(document)
            tally.add(("read", document.domain), length)
            tally.add(("read_length", str(length_bin(length)), document.domain), length)
            num_characters += length
            if num_characters >= BLOCK_CHARACTERS:
                break
    write_tally(stage.tally(number), tally)
    return True


def _mark_duplicate_ids(stage: Stage, index: _IdIndex, *, refuse: bool) -> None:
    """Write per block the positions of documents whose id an earlier document has."""
    shutil.rmtree(stage.duplicates, ignore_errors=True)
    found: dict[int, list[int]] = {}
    first: dict[str, int] = {}
    for position, identifier in _suspects(stage, index):
        if identifier not in first:
            first[identifier] = position
            continue
        if refuse:
            raise PipelineError(
                f"{index.where(position)}: id {identifier!r} is also that of "
                f"{index.where(first[identifier])}; make ids unique (id_key=NONE names documents "
                "by file and line), or give on_error=skip to keep the first and count the others"
            )
        block, within = index.place(position)
        found.setdefault(block, []).append(within)
    for block, positions in found.items():
        write_removals(stage, block, positions)


def _suspects(stage: Stage, index: _IdIndex) -> Iterator[tuple[int, str]]:
    """Yield (position, id) in order of all documents whose id has the hash of another."""
    hashes = np.frombuffer(index.hashes, dtype=np.uint64)
    values, counts = np.unique(hashes, return_counts=True)
    positions = np.flatnonzero(np.isin(hashes, values[counts > 1]))
    by_block = itertools.groupby(positions.tolist(), key=lambda p: index.place(p)[0])
    for block, group in by_block:
        wanted = set(group)
        start = index.block_starts[block]
        for within, document in enumerate(read_block(stage.block(block))):
            if start + within in wanted:
                yield start + within, document.id
