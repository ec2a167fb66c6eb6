"""JSONL: plain files in byte ranges that any process can read alone; gz and zst as a stream.

A range holds the lines that begin in it, so every line belongs to one range wherever it is cut.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa

from data_pipeline.sources.inputs import Input
from data_pipeline.sources.records import Fault, Row, SourceOptions, row_of

CHUNK_BYTES = 2**20


def read_range(
    path: str, start: int, stop: int, options: SourceOptions
) -> tuple[list[Row | Fault], int]:
    """Return the rows and faults of the lines that begin in [start, stop), and their number."""
    with Path(path).open("rb", buffering=0) as stream:
        first = max(0, start - 1)
        stream.seek(first)
        data = _read_exactly(stream, stop - first)
        begin = data.find(b"\n") + 1 if start else 0
        if start and not begin:
            return [], 0
        end = data.rfind(b"\n") + 1
        items, num_lines = parse_lines(data, first, options, begin, end)
        if end == len(data):
            return items, num_lines
        rest = _rest_of_line(stream, options.max_document_bytes - (len(data) - end))
    if rest is None:
        last: Row | Fault = _too_long(num_lines + 1, first + end, options)
    else:
        line = memoryview((data[end:] + rest).removesuffix(b"\n"))
        last = _parse_line(line, num_lines + 1, first + end, options)
    return [*items, last], num_lines + 1


def parse_lines(
    data: bytes, offset: int, options: SourceOptions, begin: int = 0, end: int | None = None
) -> tuple[list[Row | Fault], int]:
    """Return the rows and faults of whole lines, and how many lines there are.

    Args:
        data: lines, each but the last of a file ended by a newline.
        offset: of `data` in its file, for messages.
        options: keys and limits.
        begin: where in `data` the first line begins.
        end: where the last line has ended; the end of `data` unless given.
    """
    view = memoryview(data)
    stop = len(data) if end is None else end
    items: list[Row | Fault] = []
    number, start = 0, begin
    while start < stop:
        number += 1
        newline = data.find(b"\n", start, stop)
        line = view[start : newline if newline >= 0 else stop]
        if len(line) > options.max_document_bytes:
            items.append(_too_long(number, offset + start, options))
        else:
            items.append(_parse_line(line, number, offset + start, options))
        start += len(line) + 1
    return items, number


def _parse_line(line: memoryview, number: int, offset: int, options: SourceOptions) -> Row | Fault:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return _bad_line(bytes(line), number, offset, str(error))
    return row_of(record, number, options)


def read_packed(
    source: Input, options: SourceOptions, block_bytes: int
) -> Iterator[tuple[bytes, int, list[Fault], int]]:
    """Yield (whole lines, their offset, a fault after them, compressed bytes read) in order."""
    pending = bytearray()
    offset = position = 0
    skipping = False
    try:
        for chunk, position in _unpacked(source):
            cut = chunk.find(b"\n") + 1 if skipping else 0
            if skipping and not cut:
                offset += len(chunk)
                continue
            offset += cut
            skipping = False
            pending += memoryview(chunk)[cut:]
            if len(pending) < block_bytes:
                continue
            end = pending.rfind(b"\n") + 1
            skipping = len(pending) - end > options.max_document_bytes
            if not end and not skipping:
                continue
            lines = bytes(pending[:end])
            fault = _too_long(lines.count(b"\n") + 1, offset + end, options)
            yield lines, offset, [fault] if skipping else [], position
            offset += len(pending) if skipping else end
            del pending[: len(pending) if skipping else end]
    except (EOFError, zlib.error) as error:
        lines = bytes(pending[: pending.rfind(b"\n") + 1])
        detail = f"(byte {offset + len(lines)} of what it unpacks to): {error}"
        yield lines, offset, [Fault("truncated", lines.count(b"\n") + 1, detail)], position
        return
    if pending:
        yield bytes(pending), offset, [], position


def _unpacked(source: Input) -> Iterator[tuple[bytes, int]]:
    """Yield (unpacked bytes, compressed bytes read so far).

    Raises:
        EOFError: the content is cut or not what it says; zlib.error likewise.
    """
    with Path(source.path).open("rb") as stream:
        unpacked = (
            gzip.GzipFile(fileobj=stream)
            if source.kind == "gz"
            else pa.CompressedInputStream(stream, "zstd")
        )
        while chunk := _read_unpacked(unpacked):
            yield chunk, stream.tell()


def _read_unpacked(stream: Any) -> bytes:
    try:
        return stream.read(CHUNK_BYTES)
    except OSError as error:
        if error.errno is not None:  # of the disk, not of the content
            raise
        raise EOFError(str(error)) from None


def _read_exactly(stream: BinaryIO, num_bytes: int) -> bytes:
    """Return up to so many bytes: raw reads may return fewer than asked."""
    parts = []
    while num_bytes and (part := stream.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _rest_of_line(stream: BinaryIO, max_bytes: int) -> bytes | None:
    """Return the stream up to and with the next newline or its end; None beyond max_bytes."""
    rest = bytearray()
    while chunk := stream.read(CHUNK_BYTES):
        newline = chunk.find(b"\n")
        rest += chunk[: newline + 1] if newline >= 0 else chunk
        if len(rest) > max_bytes:
            return None
        if newline >= 0:
            break
    return bytes(rest)


def _too_long(number: int, offset: int, options: SourceOptions) -> Fault:
    limit = options.max_document_bytes
    return Fault("too_long", number, f"(byte {offset}) exceeds max_document_bytes={limit}")


def _bad_line(line: bytes, number: int, offset: int, error: str) -> Fault:
    try:
        line.decode()
    except UnicodeDecodeError as wrong:
        return Fault("invalid_utf8", number, f"(byte {offset + wrong.start}) is not UTF-8")
    if 0 in line:
        return Fault("nul", number, f"(byte {offset + line.index(0)}) has a NUL byte")
    return Fault("invalid_json", number, f"(byte {offset}) is not JSON ({error})")
