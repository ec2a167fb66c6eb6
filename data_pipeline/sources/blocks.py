"""Inputs cut into blocks: pieces of a few megabytes that one process reads on its own.

`plan_blocks` runs in one process and touches as little data as the format allows; `read_block` may
run in any. Both are deterministic, so a block's number within its input names it for good.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from data_pipeline.sources.hub import read_hub
from data_pipeline.sources.inputs import Input
from data_pipeline.sources.jsonl import parse_lines, read_packed, read_range
from data_pipeline.sources.records import Fault, Row, SourceOptions, row_of
from data_pipeline.sources.tables import read_arrow, read_parquet
from data_pipeline.sources.text import group_files, read_files


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A piece of one input."""

    kind: str
    """`range`, `lines`, `files` or `records`: what `content` is."""
    content: Any
    """(path, start, stop); (lines, offset); ([(path, name)], is_tree); [record or Fault]."""
    position_bytes: int
    """How much of the input on disk is read once this block is."""
    faults: tuple[Fault, ...] = ()
    """What ends this block, found while it was cut; numbers count from the block's start."""


def plan_blocks(
    source: Input, options: SourceOptions, block_bytes: int, start: int = 0
) -> Iterator[Block]:
    """Yield the blocks of an input from number `start` on, in order."""
    if source.kind == "jsonl":
        for at in range(start * block_bytes, source.num_bytes, block_bytes):
            stop = min(at + block_bytes, source.num_bytes)
            yield Block("range", (source.path, at, stop), stop)
        return
    for number, block in enumerate(_stream_blocks(source, options, block_bytes)):
        if number >= start:
            yield block


def read_block(block: Block, options: SourceOptions) -> tuple[list[Row | Fault], int]:
    """Return the rows and faults of a block in order, and the lines or rows it covers."""
    if block.kind == "range":
        path, start, stop = block.content
        items, count = read_range(path, start, stop, options)
    elif block.kind == "lines":
        lines, offset = block.content
        items, count = parse_lines(lines, offset, options)
    elif block.kind == "files":
        files, is_tree = block.content
        items, count = read_files(files, is_tree, options)
    else:
        items = [_item(record, i, options) for i, record in enumerate(block.content, start=1)]
        count = len(items)
    return [*items, *block.faults], count + len(block.faults)


def _stream_blocks(source: Input, options: SourceOptions, block_bytes: int) -> Iterator[Block]:
    if source.kind in ("gz", "zst"):
        for lines, offset, faults, position in read_packed(source, options, block_bytes):
            yield Block("lines", (lines, offset), position, tuple(faults))
    elif source.kind in ("parquet", "arrow"):
        read = read_parquet if source.kind == "parquet" else read_arrow
        for records, faults, position in read(source, options, block_bytes):
            yield Block("records", records, position, tuple(faults))
    elif source.kind in ("text", "tree"):
        for files, position in group_files(source, block_bytes):
            yield Block("files", (files, source.kind == "tree"), position)
    else:
        assert source.kind == "hf", source.kind
        for records in read_hub(source, options, block_bytes):
            yield Block("records", records, source.num_bytes)


def _item(record: Any, number: int, options: SourceOptions) -> Row | Fault:
    if isinstance(record, Fault):
        return dataclasses.replace(record, number=number)
    row = row_of(record, number, options)
    if isinstance(row, Row) and len(row.text) > options.max_document_bytes:
        limit = options.max_document_bytes
        return Fault("too_long", number, f"exceeds max_document_bytes={limit}")
    return row
