"""Token shards written by `data_pipeline.tokenize`: Megatron's .bin/.idx with a manifest.

The two files are mapped with numpy alone: megatron's IndexedDataset reads the same files,
but its import takes ten seconds. Format: NVIDIA/Megatron-LM,
megatron/core/datasets/indexed_dataset.py.
"""

import dataclasses
import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from ring_train.data.errors import DataError

INDEX_HEADER = b"MMIDIDX\x00\x00"
INDEX_FIELDS = struct.Struct("<QBQQ")
DTYPES = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
"""Megatron's codes of the two id types in use."""
MANIFEST_KEYS = (
    *("bin_sha256", "idx_sha256", "documents", "tokens", "dtype"),
    *("max_token_id", "tokenizer"),
)
OPTIONAL_MANIFEST_KEYS = ("mask_sha256", "inputs")


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """The documents of one domain and split."""

    prefix: str
    tokens: np.ndarray
    """[tokens] ids of all documents end to end, mapped."""
    lengths: np.ndarray
    """[documents] int32 tokens of each document, end-of-text included, mapped."""
    offsets: np.ndarray
    """[documents] int64 bytes before each document in .bin, mapped."""
    manifest: dict[str, Any]
    loss_mask: np.ndarray | None = None
    """[tokens] bool: which tokens are trained on, mapped; None for all."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, end-of-text included."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.lengths)

    def begins(self, documents: np.ndarray) -> np.ndarray:
        """Return where documents begin in `tokens`."""
        return self.offsets[documents] // self.tokens.itemsize

    @property
    def sha256(self) -> str:
        """Hash of the hashes of .bin, .idx and .mask that the manifest states."""
        both = self.manifest["bin_sha256"] + self.manifest["idx_sha256"]
        both += self.manifest.get("mask_sha256") or ""
        return hashlib.sha256(both.encode()).hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class Expected:
    """What a shard must fit."""

    tokenizer: str
    """Folder with tokenizer.json."""
    vocab_size: int
    """Rows of the model's embedding."""
    eos_token_id: int


def open_shard(prefix: str, expected: Expected) -> Shard:
    """Return a shard after checking it against its manifest, the tokenizer and the model.

    Raises:
        DataError: missing or torn files, another tokenizer, or ids beyond the embedding.
    """
    manifest = _read_manifest(prefix)
    _check_tokenizer(prefix, manifest, expected)
    return _map_files(prefix, manifest)


def tokenizer_fingerprint(folder: str) -> str:
    """Return the SHA-256 of the bytes of tokenizer.json, as manifests record it."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"data.tokenizer={folder} has no tokenizer.json; give a tokenizer's folder")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_manifest(prefix: str) -> dict[str, Any]:
    for suffix in ("idx", "bin", "json"):
        if not Path(f"{prefix}.{suffix}").is_file():
            raise DataError(
                f"{prefix}.{suffix} does not exist; write the shard with "
                f"`python -m data_pipeline.tokenize input=GLOB tokenizer=DIR output={prefix}`"
            )
    try:
        manifest = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
        needed = {key: manifest[key] for key in MANIFEST_KEYS}
        return needed | {key: manifest.get(key) for key in OPTIONAL_MANIFEST_KEYS}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{prefix}.json is not a shard's manifest ({error}); tokenize again"
        ) from None


def _check_tokenizer(prefix: str, manifest: dict[str, Any], expected: Expected) -> None:
    made_by = manifest["tokenizer"]
    fingerprint = tokenizer_fingerprint(expected.tokenizer)
    if made_by["sha256"] != fingerprint:
        raise DataError(
            f"{prefix}.json: tokenizer fingerprint {made_by['sha256'][:12]} differs from "
            f"{fingerprint[:12]} of data.tokenizer={expected.tokenizer}; tokenize again or "
            "give the tokenizer that made the shard"
        )
    num_ids = max(made_by["vocab_size"], manifest["max_token_id"] + 1)
    if num_ids > expected.vocab_size:
        raise DataError(
            f"{prefix}: its tokenizer {expected.tokenizer} has {num_ids} ids, more than "
            f"model.vocab_size={expected.vocab_size}; set model.vocab_size to at least {num_ids}"
        )
    if made_by["eos_token_id"] != expected.eos_token_id:
        raise DataError(
            f"{prefix}: documents end with id {made_by['eos_token_id']}, not with "
            f"model.eos_token_id={expected.eos_token_id}; set it to {made_by['eos_token_id']}"
        )


def _map_files(prefix: str, manifest: dict[str, Any]) -> Shard:
    """Return the mapped shard if sizes and counts of .idx, .bin and manifest agree."""
    start = len(INDEX_HEADER) + INDEX_FIELDS.size
    with Path(f"{prefix}.idx").open("rb") as stream:
        header = stream.read(start)
    if len(header) < start or not header.startswith(INDEX_HEADER):
        raise DataError(f"{prefix}.idx is not a Megatron index; tokenize again")
    index = np.asarray(np.memmap(f"{prefix}.idx", mode="r", dtype=np.uint8))
    version, code, num_documents, _ = INDEX_FIELDS.unpack_from(header, len(INDEX_HEADER))
    if version != 1 or code not in DTYPES or len(index) < start + 12 * num_documents:
        raise DataError(
            f"{prefix}.idx: version {version}, type code {code}, {num_documents} documents in "
            f"{len(index)} bytes; version 1 and type code 4 or 8 are expected: tokenize again"
        )
    dtype = DTYPES[code]
    lengths = np.frombuffer(index, dtype="<i4", count=num_documents, offset=start)
    offsets = np.frombuffer(
        index, dtype="<i8", count=num_documents, offset=start + 4 * num_documents
    )
    bin_bytes = Path(f"{prefix}.bin").stat().st_size
    end = int(offsets[-1]) // dtype.itemsize + int(lengths[-1]) if num_documents else 0
    found = (num_documents, end, bin_bytes // dtype.itemsize)
    stated = (manifest["documents"], manifest["tokens"], manifest["tokens"])
    if found != stated:
        raise DataError(
            f"{prefix}: (documents, tokens in .idx, tokens in .bin) = {found}, but its manifest "
            f"says {stated}; the files are not of one run: tokenize again"
        )
    tokens = np.asarray(np.memmap(f"{prefix}.bin", mode="r", dtype=dtype))
    return Shard(prefix, tokens, lengths, offsets, manifest, _map_mask(prefix, manifest))


def _map_mask(prefix: str, manifest: dict[str, Any]) -> np.ndarray | None:
    """Return the loss mask, if the manifest states one: PREFIX.mask, one byte a token, 0 or 1."""
    if manifest.get("mask_sha256") is None:
        return None
    path = Path(f"{prefix}.mask")
    size = path.stat().st_size if path.is_file() else 0
    if size != manifest["tokens"]:
        raise DataError(
            f"{path} has {size} bytes, but {prefix}.json states a mask of {manifest['tokens']} "
            "tokens; the files are not of one run: tokenize again"
        )
    return np.asarray(np.memmap(path, mode="r", dtype=np.bool_))
