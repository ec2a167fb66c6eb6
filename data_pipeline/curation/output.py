"""The finished folder: documents by domain in input order, drops by step, and the report.

Compressed files are the compressed blocks end to end: a zstd stream of several frames.
"""

import contextlib
import dataclasses
import hashlib
import io
import shutil
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import orjson
import zstandard

from data_pipeline.config import PipelineError
from data_pipeline.curation.arguments import Compression, Curate
from data_pipeline.curation.nodes import STEPS
from data_pipeline.curation.passes import NamedStep, piece_name, split_passes
from data_pipeline.curation.reading import Corpus
from data_pipeline.curation.stages import Stage, read_tally
from data_pipeline.curation.tally import Tally, check_conservation
from data_pipeline.documents import write_json

REPORT = "curation.json"
FORMAT_VERSION = 1
"""Of the work folder and the report; another one starts afresh."""
COPY_BYTES = 1 << 20


def publish(
    config: Curate, steps: list[NamedStep], corpus: Corpus, tally: Tally, work: Path
) -> None:
    """Check the count, write the finished folder inside `work`, and rename it into place.

    Raises:
        PipelineError: documents are missing or too many, in the tally or in the files.
    """
    check_conservation(tally)
    num_passes = len(split_passes(steps))
    folder = work / "output"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    last = Stage(work / f"pass-{num_passes}")
    files = _write_documents(config, last, corpus.num_blocks, folder)
    dropped = Counter[str]()
    for number in range(1, num_passes + 1):
        dropped += _write_dropped(Stage(work / f"pass-{number}"), corpus.num_blocks, folder)
    _check_files(tally, files, dropped if config.dropped.value != "none" else None)
    report = {
        **_counts(tally),
        "config": _config_record(config),
        "files": files,
        "identity": (work / "identity").read_text(),
        "inputs": corpus.inputs,
        "libraries": {"datatrove": version("datatrove")},
        "skipped": corpus.skipped,
        "steps": [_step_record(named) for named in steps],
        "version": FORMAT_VERSION,
    }
    write_json(folder / REPORT, report)
    output = Path(config.output)
    folder.rename(output)


def _write_documents(
    config: Curate, stage: Stage, num_blocks: int, folder: Path
) -> list[dict[str, Any]]:
    """Join the pieces of all blocks in order and return a record per file."""
    zstd = config.compression is Compression.zst
    suffix = ".jsonl.zst" if zstd else ".jsonl"
    with contextlib.ExitStack() as stack:
        writers: dict[str, _Writer] = {}
        for number in range(num_blocks):
            for domain in sorted(read_tally(stage.tally(number)).by_domain("kept")):
                if domain not in writers:
                    prefix = folder / piece_name(domain)
                    writer = _Writer(prefix, suffix, domain, config.file_bytes)
                    writers[domain] = stack.enter_context(contextlib.closing(writer))
                piece = stage.pieces(number) / piece_name(domain)
                writers[domain].append(piece, zstd=zstd)
    return [record for domain in sorted(writers) for record in writers[domain].files]


class _Writer:
    """The files of one domain; the next one begins once a file has its size."""

    def __init__(self, prefix: Path, suffix: str, domain: str, file_bytes: int) -> None:
        self._prefix, self._suffix = prefix, suffix
        self._domain, self._file_bytes = domain, file_bytes
        self._stream: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self.files: list[dict[str, Any]] = []

    def append(self, piece: Path, *, zstd: bool) -> None:
        """Add a whole piece to the current file, or to a new one."""
        if self._stream is None:
            path = Path(f"{self._prefix}-{len(self.files):05d}{self._suffix}")
            self._stream = path.open("wb")
            self._hash = hashlib.sha256()
            record = {"bytes": 0, "documents": 0, "domain": self._domain, "name": path.name}
            self.files.append(record)
        record = self.files[-1]
        record["documents"] += _num_lines(piece, zstd=zstd)
        with piece.open("rb") as source:
            while data := source.read(COPY_BYTES):
                self._stream.write(data)
                self._hash.update(data)
                record["bytes"] += len(data)
        if record["bytes"] >= self._file_bytes:
            self.close()

    def close(self) -> None:
        """Finish the current file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self.files[-1]["sha256"] = self._hash.hexdigest()


def _num_lines(piece: Path, *, zstd: bool) -> int:
    """Return the lines of a piece as a reader will find them."""
    with piece.open("rb") as raw:
        reader = zstandard.ZstdDecompressor().stream_reader(raw) if zstd else raw
        stream = io.BufferedReader(reader, COPY_BYTES) if zstd else raw  # type: ignore[arg-type]  # a RawIOBase
        return sum(data.count(b"\n") for data in iter(lambda: stream.read(COPY_BYTES), b""))


def _write_dropped(stage: Stage, num_blocks: int, folder: Path) -> Counter[str]:
    """Append what a pass dropped to one file per step and return the lines of each."""
    lines = Counter[str]()
    paths = [stage.dropped(number) for number in range(num_blocks)]
    with contextlib.ExitStack() as stack:
        streams: dict[str, BinaryIO] = {}
        for path in filter(Path.exists, paths):
            with path.open("rb") as source:
                for line in source:
                    step = orjson.loads(line)["step"]
                    if step not in streams:
                        (folder / "dropped").mkdir(exist_ok=True)
                        target = folder / "dropped" / f"{quote(step, safe='')}.jsonl"
                        streams[step] = stack.enter_context(target.open("wb"))
                    streams[step].write(line)
                    lines[step] += 1
    return lines


def _check_files(tally: Tally, files: list[dict[str, Any]], dropped: Counter[str] | None) -> None:
    """Check that the files hold what the tally says."""
    written = Counter[str]()
    for record in files:
        written[record["domain"]] += record["documents"]
    kept = {domain: documents for domain, (documents, _) in tally.by_domain("kept").items()}
    names = {key[1] for key in tally.documents if key[0] == "dropped"}
    drops = {name: tally.total("dropped", name)[0] for name in names}
    if dict(written) != kept or (dropped is not None and dict(dropped) != drops):
        raise PipelineError(
            f"the files hold {dict(written)} documents and {dict(dropped or {})} drops, the count "
            f"says {kept} and {drops}; nothing was published, remove the .partial folder and retry"
        )


def _counts(tally: Tally) -> dict[str, Any]:
    """Return the entries of the report that come from the tally."""
    rows = [key for key in sorted(tally.documents) if key[0] == "dropped"]
    domains = {
        kind: {
            domain: {"characters": characters, "documents": documents}
            for domain, (documents, characters) in tally.by_domain(kind).items()
        }
        for kind in ("read", "kept")
    }
    lengths: dict[str, dict[str, dict[str, int]]] = {"read": {}, "kept": {}}
    for key, documents in sorted(tally.documents.items()):
        if key[0] in ("read_length", "kept_length"):
            kind = key[0].removesuffix("_length")
            lengths[kind].setdefault(key[-1], {})[key[1]] = documents
    totals = {}
    for kind in ("read", "kept", "dropped", "edited"):
        documents, characters = tally.total(kind)
        totals[kind] = {"characters": characters, "documents": documents}
    return {
        "domains": domains,
        "dropped": [
            {
                **dict(zip(("step", "reason", "domain"), key[1:], strict=True)),
                "characters": tally.characters[key],
                "documents": tally.documents[key],
            }
            for key in rows
        ],
        "edited": [
            {
                "characters_removed": tally.characters[key],
                "documents": tally.documents[key],
                "domain": key[2],
                "step": key[1],
            }
            for key in sorted(tally.documents)
            if key[0] == "edited"
        ],
        "length_half_octaves": lengths,
        "totals": totals,
    }


def _config_record(config: Curate) -> dict[str, Any]:
    """Return the arguments that the content of the folder depends on."""
    values: dict[str, Any] = dataclasses.asdict(config)
    for name in ("steps", "output", "workers"):
        values.pop(name)
    values["compression"] = config.compression.value
    values["dropped"] = config.dropped.value
    return values


def _step_record(named: NamedStep) -> dict[str, Any]:
    kinds = {kind: name for name, kind in STEPS.items()}
    parameters = orjson.loads(
        orjson.dumps(dataclasses.asdict(named.step), option=orjson.OPT_NON_STR_KEYS)
    )
    return {"name": named.name, "parameters": parameters, "step": kinds[type(named.step)]}
