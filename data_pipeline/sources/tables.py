"""Parquet and Arrow (IPC file or stream), read batch by batch on one thread."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.sources.inputs import Input
from data_pipeline.sources.records import MESSAGES_KEY, Fault, SourceOptions

MAX_BATCH_ROWS = 4096
CHAT_COLUMNS = (MESSAGES_KEY, "tools", "chat_template_kwargs")
ARROW_FILE_MAGIC = b"ARROW1"

Batch = tuple[list[Any], list[Fault], int]
"""Records (dicts; a Fault in the place of one that cannot be decoded), faults after them, bytes of
the file read."""


def read_parquet(source: Input, options: SourceOptions, block_bytes: int) -> Iterator[Batch]:
    """Yield the rows of a Parquet file in batches of about `block_bytes`."""
    row = 0
    num_rows = 1
    try:
        with pq.ParquetFile(source.path) as file:
            num_rows = max(1, file.metadata.num_rows)
            wanted = _columns(file.schema_arrow, options)
            if isinstance(wanted, Fault):
                yield [], [_all_of(wanted, num_rows)], source.num_bytes
                return
            for group in range(file.num_row_groups):
                size = _batch_rows(file.metadata.row_group(group), block_bytes)
                for batch in file.iter_batches(size, [group], columns=wanted, use_threads=False):
                    row += batch.num_rows
                    yield _records(batch), [], source.num_bytes * row // num_rows
    except (pa.ArrowException, OSError) as error:
        fault = Fault("corrupt", 1, f"cannot be read: {error}", max(1, num_rows - row))
        yield [], [fault], source.num_bytes


def read_arrow(source: Input, options: SourceOptions, block_bytes: int) -> Iterator[Batch]:
    """Yield the rows of an Arrow file or stream in batches of about `block_bytes`."""
    try:
        with pa.OSFile(source.path) as stream:
            for batch in _record_batches(source.path, stream):
                wanted = _columns(batch.schema, options)
                if isinstance(wanted, Fault):
                    yield [], [_all_of(wanted, batch.num_rows)], stream.tell()
                    continue
                part = batch.select(wanted)
                size = max(1, part.num_rows * block_bytes // max(1, part.nbytes))
                for start in range(0, part.num_rows, size):
                    yield _records(part.slice(start, size)), [], stream.tell()
    except (pa.ArrowException, OSError) as error:
        yield [], [Fault("truncated", 1, f"cannot be read: {error}")], source.num_bytes


def _record_batches(path: str, stream: pa.NativeFile) -> Iterator[pa.RecordBatch]:
    with Path(path).open("rb") as file:
        is_file = file.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
    if not is_file:
        yield from pa.ipc.open_stream(stream)
        return
    reader = pa.ipc.open_file(stream)
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _columns(schema: pa.Schema, options: SourceOptions) -> list[str] | Fault:
    """Return the columns to read, or what is wrong with them."""
    if options.messages:
        return _chat_columns(schema, options)
    key = options.text_key
    if key not in schema.names:
        if MESSAGES_KEY in schema.names and not options.text_only:
            return list(schema.names)
        return Fault("schema", 1, f"has no column {key!r}; it has {', '.join(schema.names)}")
    kind = schema.field(key).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return Fault("schema", 1, f"has column {key!r} of type {kind}, not string")
    if not options.text_only:
        return list(schema.names)
    return [name for name in (key, options.id_key) if name in schema.names]


def _chat_columns(schema: pa.Schema, options: SourceOptions) -> list[str] | Fault:
    if MESSAGES_KEY not in schema.names:
        detail = f"has no column {MESSAGES_KEY!r}; it has {', '.join(schema.names)}"
        return Fault("schema", 1, detail)
    kind = schema.field(MESSAGES_KEY).type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return Fault("schema", 1, f"has column {MESSAGES_KEY!r} of type {kind}, not a list")
    return [name for name in (*CHAT_COLUMNS, options.id_key) if name in schema.names]


def _all_of(fault: Fault, num_rows: int) -> Fault:
    return Fault(fault.reason, fault.number, f"{fault.detail}: {num_rows} rows", num_rows)


def _batch_rows(group: Any, block_bytes: int) -> int:
    """Return how many rows of a row group to decode at once."""
    row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
    return min(MAX_BATCH_ROWS, max(1, block_bytes // row_bytes))


def _records(batch: pa.RecordBatch) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [_record(batch, row) for row in range(batch.num_rows)]


def _record(batch: pa.RecordBatch, row: int) -> Any:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return Fault("invalid_utf8", 1, "is not UTF-8")
