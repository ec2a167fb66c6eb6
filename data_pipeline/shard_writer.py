r"""Writer of Megatron's token shards, PREFIX.bin and PREFIX.idx, with a manifest PREFIX.json.

A shard of conversations has a loss mask too, PREFIX.mask: a byte a token, 1 for what is trained.

Format, little-endian (NVIDIA/Megatron-LM megatron/core/datasets/indexed_dataset.py): the .bin
file holds the token ids of all documents end to end; the .idx file `MMIDIDX\0\0`, u64 version 1,
u8 dtype code, u64 number of sequences, u64 number of bounds, i32 lengths, i64 byte offsets,
i64 document bounds. One sequence is one document here.

Everything is written to PREFIX.*.partial and appears by rename, the .idx last: a reader that finds
an .idx finds a whole shard. Memory does not grow with the shard.
"""

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import PipelineError

INDEX_HEADER = b"MMIDIDX\x00\x00"
DTYPE_CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
MAX_UINT16_VOCAB = 65500
"""Megatron's bound for two-byte ids."""
MANIFEST_VERSION = 1
PUBLISHED = ("json", "bin", "mask", "ids", "idx")
"""Suffixes in the order in which the files appear."""
APPENDED = ("bin", "ids", "lengths")
"""Suffixes of the files that grow with the documents; lengths (int32) become the index."""
MASK = "mask"
"""Suffix of one more, of shards with a loss mask."""
CHUNK_BYTES = 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizerRecord:
    """What a shard remembers of the tokenizer that made it."""

    sha256: str
    """Of the bytes of tokenizer.json: the fingerprint."""
    vocab_size: int
    eos_token_id: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of an id on disk."""
        return np.dtype(np.uint16 if self.vocab_size < MAX_UINT16_VOCAB else np.int32)


@dataclasses.dataclass(slots=True)
class ShardSize:
    """How much of a shard is written."""

    documents: int = 0
    tokens: int = 0
    ids_bytes: int = 0
    max_token_id: int = 0


class ShardFiles:
    """The growing files of a shard; open them at a size that was synced to go on from there."""

    def __init__(
        self, prefix: Path, dtype: np.dtype[Any], size: ShardSize, *, masked: bool = False
    ) -> None:
        """Cut the files to `size` and hash what is there; `masked` ones have a loss mask."""
        self._prefix, self._dtype, self.size = prefix, dtype, size
        prefix.parent.mkdir(parents=True, exist_ok=True)
        lengths = {
            "bin": size.tokens * dtype.itemsize,
            "ids": size.ids_bytes,
            "lengths": size.documents * 4,
        }
        if masked:
            lengths[MASK] = size.tokens
        self._streams = {name: _open_at(self.partial(name), n) for name, n in lengths.items()}
        self._hashes = {name: hashlib.sha256() for name in ("bin", MASK) if name in lengths}
        for name, digest in self._hashes.items():
            for chunk in read_chunks(self.partial(name)):
                digest.update(chunk)

    def partial(self, suffix: str) -> Path:
        """Return the path of an unfinished file."""
        return partial_path(self._prefix, suffix)

    def append(
        self,
        tokens: np.ndarray | memoryview,
        lengths: np.ndarray,
        names: bytes,
        mask: bytes | None = None,
    ) -> None:
        """Append documents: ids of the shard's dtype, int32 lengths, one line a name, the mask."""
        self._streams["bin"].write(tokens)
        self._hashes["bin"].update(tokens)
        if mask is not None:
            self._streams[MASK].write(mask)
            self._hashes[MASK].update(mask)
        self._streams["lengths"].write(lengths.data)
        self._streams["ids"].write(names)
        self.size.documents += len(lengths)
        self.size.tokens += int(lengths.sum())
        self.size.ids_bytes += len(names)

    def sync(self) -> None:
        """Return when everything appended is on disk."""
        for stream in self._streams.values():
            os.fsync(stream.fileno())

    def finish(self, tokenizer: TokenizerRecord, extra: dict[str, Any]) -> dict[str, Any]:
        """Write index and manifest, still under partial names, and return the manifest."""
        self.sync()
        index_hash = hashlib.sha256()
        with self.partial("idx").open("wb") as stream:
            for part in _index_parts(self.partial("lengths"), self.size.documents, self._dtype):
                stream.write(part)
                index_hash.update(part)
            stream.flush()
            os.fsync(stream.fileno())
        manifest = {
            **extra,
            **{f"{name}_sha256": digest.hexdigest() for name, digest in self._hashes.items()},
            "documents": self.size.documents,
            "dtype": self._dtype.name,
            "idx_sha256": index_hash.hexdigest(),
            "max_token_id": self.size.max_token_id,
            "tokenizer": dataclasses.asdict(tokenizer),
            "tokens": self.size.tokens,
            "version": MANIFEST_VERSION,
        }
        with self.partial("json").open("w", encoding="utf-8") as text:
            json.dump(manifest, text, indent=2, sort_keys=True)
            text.write("\n")
            text.flush()
            os.fsync(text.fileno())
        return manifest

    def close(self) -> None:
        """Close the files, which stay."""
        for stream in self._streams.values():
            stream.close()


def publish(prefix: Path) -> None:
    """Rename the finished files into place, the index last; safe to repeat after a kill."""
    if partial_path(prefix, "idx").exists():
        Path(f"{prefix}.idx").unlink(missing_ok=True)
    for suffix in PUBLISHED:
        if (partial := partial_path(prefix, suffix)).exists():
            partial.replace(f"{prefix}.{suffix}")
    partial_path(prefix, "lengths").unlink(missing_ok=True)
    if "mask_sha256" not in json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8")):
        Path(f"{prefix}.{MASK}").unlink(missing_ok=True)  # of an older shard of conversations
    descriptor = os.open(prefix.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_shard(
    prefix: Path,
    documents: Iterable[np.ndarray],
    tokenizer: TokenizerRecord,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a shard in one go and return its manifest; documents are named 0, 1, ...

    Args:
        prefix: path without extension.
        documents: token ids of one document each, its end-of-text included, in order.
        tokenizer: what made the ids; its vocabulary chooses two or four bytes an id.
        extra: further entries of the manifest.

    Raises:
        PipelineError: there is no document.
    """
    files = ShardFiles(prefix, tokenizer.dtype, ShardSize())
    try:
        for number, document in enumerate(documents):
            ids = np.asarray(document)
            files.size.max_token_id = max(files.size.max_token_id, int(ids.max()))
            lengths = np.array([len(ids)], dtype=np.int32)
            files.append(ids.astype(tokenizer.dtype), lengths, b'"%d"\n' % number)
        if not files.size.documents:
            remove_partial(prefix)
            raise PipelineError(f"{prefix}: no document to write; the input has no text")
        manifest = files.finish(tokenizer, extra or {})
    finally:
        files.close()
    publish(prefix)
    return manifest


def remove_partial(prefix: Path) -> None:
    """Remove the unfinished files of a shard."""
    for suffix in {*PUBLISHED, *APPENDED}:
        partial_path(prefix, suffix).unlink(missing_ok=True)


def partial_path(prefix: Path, suffix: str) -> Path:
    """Return the path of an unfinished file of a shard."""
    return Path(f"{prefix}.{suffix}.partial")


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file a megabyte at a time."""
    with path.open("rb", buffering=0) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _open_at(path: Path, num_bytes: int) -> Any:
    """Return an unbuffered stream at the end of a file that was cut to `num_bytes`."""
    stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    stream.truncate(num_bytes)
    stream.seek(num_bytes)
    return _WholeWrites(stream)


class _WholeWrites:
    """An unbuffered stream whose `write` takes everything, or raises."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.fileno, self.close = stream.fileno, stream.close

    def write(self, data: Any) -> None:
        rest = memoryview(data).cast("B") if len(data) else memoryview(b"")
        while rest:
            rest = rest[self._stream.write(rest) :]


def _index_parts(path: Path, documents: int, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """Yield the bytes of the index over a file of int32 lengths."""
    bounds = documents + 1
    yield INDEX_HEADER + struct.pack("<QBQQ", 1, DTYPE_CODES[dtype], documents, bounds)
    yield from read_chunks(path)
    start = 0
    for chunk in read_chunks(path):
        ends = np.cumsum(np.frombuffer(chunk, dtype=np.int32).astype(np.int64) * dtype.itemsize)
        offsets = np.concatenate(([0], ends[:-1])) + start
        start += int(ends[-1])
        yield offsets.astype(np.int64).tobytes()
    step = CHUNK_BYTES // 8
    for first in range(0, bounds, step):
        yield np.arange(first, min(first + step, bounds), dtype=np.int64).tobytes()
