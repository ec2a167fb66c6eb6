r"""Writer of Megatron's token shards, PREFIX.bin and PREFIX.idx, with a manifest PREFIX.json.

Format, little-endian (NVIDIA/Megatron-LM megatron/core/datasets/indexed_dataset.py): the .bin
file holds the token ids of all documents end to end; the .idx file `MMIDIDX\0\0`, u64 version 1,
u8 dtype code, u64 number of sequences, u64 number of bounds, i32 lengths, i64 byte offsets,
i64 document bounds. One sequence is one document here.

Files appear by rename, the .idx last: a reader that finds an .idx finds a whole shard.
"""

import dataclasses
import hashlib
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import PipelineError
from data_pipeline.documents import file_sha256, write_json

INDEX_HEADER = b"MMIDIDX\x00\x00"
DTYPE_CODES = {np.dtype(np.uint16): 8, np.dtype(np.int32): 4}
MAX_UINT16_VOCAB = 65500
"""Megatron's bound for two-byte ids."""
MANIFEST_VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizerRecord:
    """What a shard remembers of the tokenizer that made it."""

    sha256: str
    """Of the bytes of tokenizer.json: the fingerprint."""
    vocab_size: int
    eos_token_id: int


def write_shard(
    prefix: Path,
    documents: Iterable[np.ndarray],
    tokenizer: TokenizerRecord,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a shard and return its manifest.

    Args:
        prefix: path without extension.
        documents: token ids of one document each, its end-of-text included, in order.
        tokenizer: what made the ids; its vocabulary chooses two or four bytes an id.
        extra: further entries of the manifest.

    Raises:
        PipelineError: there is no document.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size < MAX_UINT16_VOCAB else np.int32)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    paths = {kind: Path(f"{prefix}.{kind}") for kind in ("json", "bin", "idx")}
    partial = {kind: Path(f"{path}.partial") for kind, path in paths.items()}
    lengths, max_token_id, bin_hash = [], 0, hashlib.sha256()
    with partial["bin"].open("wb") as stream:
        for document in documents:
            ids = np.asarray(document)
            max_token_id = max(max_token_id, int(ids.max()))
            lengths.append(len(ids))
            data = ids.astype(dtype).tobytes()
            bin_hash.update(data)
            stream.write(data)
    if not lengths:
        partial["bin"].unlink()
        raise PipelineError(f"{prefix}: no document to write; the input has no text")
    partial["idx"].write_bytes(_index_bytes(np.array(lengths, dtype=np.int32), dtype))
    manifest = {
        **(extra or {}),
        "bin_sha256": bin_hash.hexdigest(),
        "documents": len(lengths),
        "dtype": dtype.name,
        "idx_sha256": file_sha256(partial["idx"]),
        "max_token_id": max_token_id,
        "tokenizer": dataclasses.asdict(tokenizer),
        "tokens": int(sum(lengths)),
        "version": MANIFEST_VERSION,
    }
    paths["idx"].unlink(missing_ok=True)
    write_json(paths["json"], manifest)
    partial["bin"].replace(paths["bin"])
    partial["idx"].replace(paths["idx"])
    return manifest


def _index_bytes(lengths: np.ndarray, dtype: np.dtype[Any]) -> bytes:
    offsets = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1].astype(np.int64) * dtype.itemsize, out=offsets[1:])
    bounds = np.arange(len(lengths) + 1, dtype=np.int64)
    header = struct.pack("<QBQQ", 1, DTYPE_CODES[dtype], len(lengths), len(bounds))
    return INDEX_HEADER + header + lengths.tobytes() + offsets.tobytes() + bounds.tobytes()
