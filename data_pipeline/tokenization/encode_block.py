"""One block of a source to token ids: what a worker does."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from data_pipeline.chat.options import ChatOptions
from data_pipeline.sources import Block, Fault, SourceOptions, read_block
from data_pipeline.tokenization.encoders import Encoder, ReferenceEncoder, open_fast_encoder

PROBED_FRACTION = 1 / 1000
"""Of a block's text that goes back with its ids for the referee to look at."""
MAX_PROBE_CHARACTERS = 2**16
"""A longer text is no probe: the reference takes a hundred bytes of memory a character."""
PROBE_STRIDE = 7919
"""Spreads the probes over the blocks; any prime would do."""


@dataclasses.dataclass(frozen=True, slots=True)
class Encoding:
    """How workers encode."""

    tokenizer: Path
    fast: bool
    eos_token_id: int
    dtype: np.dtype[Any]
    options: SourceOptions
    chat: ChatOptions | None = None
    """Of conversations; None for text."""

    def open(self) -> Encoder:
        """Return the encoder."""
        if not self.fast:
            return ReferenceEncoder(self.tokenizer)
        encoder = open_fast_encoder(self.tokenizer)
        assert not isinstance(encoder, str), encoder
        return encoder


type Name = bytes | int | tuple[int, str]
"""JSON of an id; or the number of a row without one, also with what comes after it."""


@dataclasses.dataclass(slots=True)
class EncodedBlock:
    """What the documents of a block become; all fields but `tokens` are small."""

    num_rows: int
    """Lines or rows read, whether or not they became documents."""
    faults: list[Fault]
    names: bytes | list[Name]
    """A line a document, its id in JSON; where ids are missing, parts of it and row numbers."""
    lengths: np.ndarray
    """[documents] int32, end-of-text included."""
    max_token_id: int
    num_characters: int
    probes: list[tuple[int, str]]
    """(document in this block, its text) for the referee."""
    tokens: Any
    """Ids of all documents end to end, in the shard's dtype; any buffer."""
    mask: bytes | None = None
    """Of each of them, 1 if it is trained; None for text."""
    chat: dict[str, int] = dataclasses.field(default_factory=dict)
    """Counts of conversations, for the manifest."""


def encode_block(block: Block, number: int, encoder: Encoder, encoding: Encoding) -> EncodedBlock:
    """Return the encoded documents of a block; `number` spreads the probes."""
    items, num_rows = read_block(block, encoding.options)
    faults, rows = [], []
    for item in items:
        if isinstance(item, Fault):
            faults.append(item)
        elif item.text:
            rows.append(item)
        elif item.record.get("messages"):
            faults.append(Fault("no_text", item.number, "is a conversation; give format=chat"))
        else:
            faults.append(Fault("empty", item.number, "is empty"))
    texts = [row.text for row in rows]
    ids = encoder.encode(texts)
    eos = np.array([encoding.eos_token_id], dtype=np.uint32)
    parts = [part for document in ids for part in (document, eos)] or [eos[:0]]
    tokens = np.concatenate(parts, dtype=encoding.dtype, casting="unsafe")
    return EncodedBlock(
        num_rows=num_rows,
        faults=faults,
        names=_names([(row.id, row.number) for row in rows]),
        lengths=np.fromiter(map(len, ids), dtype=np.int32, count=len(ids)) + np.int32(1),
        max_token_id=int(tokens.max()) if len(tokens) else 0,
        num_characters=sum(map(len, texts)),
        probes=_probes(texts, number),
        tokens=tokens,
    )


def _names(names: list[tuple[str | None, int]]) -> bytes | list[Name]:
    if all(name is not None for name, _ in names):
        return b"".join([orjson.dumps(name) + b"\n" for name, _ in names])
    return [orjson.dumps(name) if name is not None else number for name, number in names]


def join_names(names: bytes | list[Name], source: str, first_row: int) -> bytes:
    """Return the lines of PREFIX.ids; a missing id becomes SOURCE:ROW."""
    if isinstance(names, bytes):
        return names
    return b"".join([_line(name, source, first_row) + b"\n" for name in names])


def _line(name: Name, source: str, first_row: int) -> bytes:
    if isinstance(name, bytes):
        return name
    row, suffix = (name, "") if isinstance(name, int) else name
    return orjson.dumps(f"{source}:{first_row + row}{suffix}")


def _probes(texts: list[str], number: int) -> list[tuple[int, str]]:
    """Return successive documents with at least PROBED_FRACTION of the block's text."""
    wanted = PROBED_FRACTION * sum(map(len, texts))
    probes: list[tuple[int, str]] = []
    first = number * PROBE_STRIDE
    for step in range(len(texts)):
        if sum(len(text) for _, text in probes) >= wanted:
            break
        index = (first + step) % len(texts)
        if len(texts[index]) <= MAX_PROBE_CHARACTERS:
            probes.append((index, texts[index]))
    return probes
