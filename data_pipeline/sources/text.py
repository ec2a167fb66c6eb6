"""Plain text: one document a file, named by its relative path; alone or as a source tree."""

import os
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.sources.inputs import Input, walk_files
from data_pipeline.sources.records import Fault, Row, SourceOptions, row_of

MAX_BLOCK_FILES = 4096
BINARY_PROBE_BYTES = 8000
"""git's rule: a file with a NUL byte among its first so many bytes is binary."""


def group_files(source: Input, block_bytes: int) -> Iterator[tuple[list[tuple[str, str]], int]]:
    """Yield lists of (path, name) of about `block_bytes`, and the bytes up to their end."""
    if source.kind == "text":
        yield [(source.path, source.name)], source.num_bytes
        return
    group: list[tuple[str, str]] = []
    position = group_start = 0
    for path in walk_files(source.path):
        group.append((path, os.path.relpath(path, source.path)))
        position += os.path.getsize(path)
        if position - group_start >= block_bytes or len(group) == MAX_BLOCK_FILES:
            yield group, position
            group, group_start = [], position
    if group:
        yield group, position


def read_files(
    files: list[tuple[str, str]], is_tree: bool, options: SourceOptions
) -> tuple[list[Row | Fault], int]:
    """Return one row or fault a file, and how many files there are.

    Binary files are expected in a source tree and are a fault where they were named.
    """
    items: list[Row | Fault] = []
    for number, (path, name) in enumerate(files, start=1):
        item = _read_file(path, name, number, options)
        if is_tree and isinstance(item, Fault) and _is_binary(path):
            item = Fault("binary", number, item.detail)
        items.append(item)
    return items, len(files)


def _is_binary(path: str) -> bool:
    with Path(path).open("rb") as stream:
        return 0 in stream.read(BINARY_PROBE_BYTES)


def _read_file(path: str, name: str, number: int, options: SourceOptions) -> Row | Fault:
    limit = options.max_document_bytes
    if (size := os.path.getsize(path)) > limit:
        return Fault("too_long", number, f"({name}: {size} bytes) exceeds {limit}")
    data = Path(path).read_bytes()
    if 0 in data:
        return Fault("nul", number, f"({name}, byte {data.index(0)}) has a NUL byte")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return Fault("invalid_utf8", number, f"({name}, byte {error.start}) is not UTF-8")
    return row_of({options.text_key: text, options.id_key: name}, number, options)
