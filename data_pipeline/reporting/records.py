"""What the page is made of: curation reports, token shards, and the ledger of a run."""

import dataclasses
import glob
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import PipelineError
from data_pipeline.shard_writer import INDEX_HEADER

CURATION_KEYS = ("domains", "dropped", "length_half_octaves", "steps", "totals", "inputs")
LEDGER = "ledger.jsonl"


@dataclasses.dataclass(frozen=True, slots=True)
class Shards:
    """The shards of one domain together."""

    domain: str
    lengths_tokens: np.ndarray
    """Of each document, its end-of-text included."""
    num_files: int


@dataclasses.dataclass(frozen=True, slots=True)
class LedgerEntry:
    """What a run had consumed after a step."""

    step: int
    phase: str
    tokens: dict[str, int]
    """Domain -> tokens since the start of the run, over all phases."""


def read_curation(folder: Path) -> dict[str, Any]:
    """Return the report of a curated folder.

    Raises:
        PipelineError: there is none, or it is something else.
    """
    path = folder / "curation.json"
    if not path.is_file():
        raise PipelineError(f"{path} does not exist; give a folder that data_pipeline.curate wrote")
    report = _json(path)
    missing = [key for key in CURATION_KEYS if key not in report]
    if missing:
        raise PipelineError(f"{path} has no {', '.join(missing)}; curate the folder again")
    return report


def read_shards(patterns: str) -> list[Shards]:
    """Return the shards whose manifests match, by domain.

    The domain is the prefix's name, without a number of five digits at its end.

    Raises:
        PipelineError: nothing matches, or a manifest and its index disagree.
    """
    paths = sorted({Path(p) for pattern in patterns.split(",") for p in glob.glob(pattern)})
    if not paths:
        raise PipelineError(f"shards={patterns} matches no file; give PREFIX.json or a quoted glob")
    lengths: dict[str, list[np.ndarray]] = {}
    for path in paths:
        domain = re.sub(r"-\d{5}$", "", path.stem)
        lengths.setdefault(domain, []).append(_shard_lengths(path))
    return [Shards(domain, np.concatenate(of), len(of)) for domain, of in lengths.items()]


def read_ledger(folder: Path) -> list[LedgerEntry]:
    """Return the ledger of a run by step; empty where the run wrote none.

    Steps that a resumed run did again count once, as the last run did them. A last line without
    its end is one that is being written.

    Raises:
        PipelineError: the folder does not exist, or a line is no entry.
    """
    if not folder.is_dir():
        raise PipelineError(f"run={folder} is no folder; give the run_dir of a training run")
    path = folder / LEDGER
    if not path.is_file():
        return []
    entries: list[LedgerEntry] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        entry = _ledger_entry(line, f"{path}:{number}")
        while entries and entries[-1].step >= entry.step:
            entries.pop()
        entries.append(entry)
    return entries


def _ledger_entry(line: bytes, where: str) -> LedgerEntry:
    try:
        record = json.loads(line)
        tokens: dict[str, int] = {}
        for domains in record["tokens"].values():
            for domain, count in domains.items():
                tokens[domain] = tokens.get(domain, 0) + int(count)
        return LedgerEntry(int(record["step"]), str(record["phase"]), tokens)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PipelineError(
            f"{where} is no ledger entry ({type(error).__name__}: {error}); expected "
            '{"step": ..., "phase": ..., "tokens": {PHASE: {DOMAIN: ...}}}'
        ) from None


def _shard_lengths(path: Path) -> np.ndarray:
    """Return the lengths of a shard's documents."""
    manifest = _json(path)
    if "tokens" not in manifest or "idx_sha256" not in manifest:
        raise PipelineError(f"{path} is no manifest of a token shard; narrow shards=")
    index = path.with_suffix(".idx")
    if not index.is_file():
        raise PipelineError(f"{index} does not exist; tokenize again, {path} is alone")
    with index.open("rb") as stream:
        start = stream.read(len(INDEX_HEADER))
        header = stream.read(struct.calcsize("<QBQQ"))
        if start != INDEX_HEADER or len(header) < struct.calcsize("<QBQQ"):
            raise PipelineError(f"{index} is no index of Megatron; tokenize again")
        num_documents = struct.unpack("<QBQQ", header)[2]
        lengths = np.fromfile(stream, dtype="<i4", count=num_documents)
    found = {"documents": len(lengths), "tokens": int(lengths.sum(dtype=np.int64))}
    said = {key: manifest.get(key) for key in found}
    if found != said:
        raise PipelineError(f"{index} has {found}, its manifest says {said}; tokenize again")
    return lengths


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise PipelineError(f"{path} holds no object")
    return content
