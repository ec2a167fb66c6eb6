"""What decides the bytes of a shard, as digests; and hashes of whole inputs."""

import dataclasses
import hashlib
import os
from importlib.metadata import version
from pathlib import Path

import orjson

from data_pipeline.chat.options import ChatOptions
from data_pipeline.config import PipelineError
from data_pipeline.shard_writer import TokenizerRecord, read_chunks
from data_pipeline.sources import Input, SourceOptions
from data_pipeline.sources.inputs import walk_files
from data_pipeline.tokenization.journal import Job

LIBRARIES = ("gigatoken", "tokenizers")


def describe_job(
    inputs: list[Input], tokenizer: TokenizerRecord, options: SourceOptions, block_bytes: int
) -> Job:
    """Return the digests; inputs count by kind, name, size and time of change."""
    described = [[s.kind, s.name, s.num_bytes, s.mtime_ns] for s in inputs]
    settings = [options.text_key, options.id_key, options.on_error, options.max_document_bytes]
    return {
        "tokenizer": tokenizer.sha256,
        "inputs": _digest(described),
        "options": _digest([*settings, block_bytes]),
        "software": " ".join(f"{name} {version(name)}" for name in LIBRARIES),
    }


def describe_chat(options: ChatOptions, template_sha256: str) -> Job:
    """Return the digest of what decides how conversations are rendered and cut."""
    settings = [dataclasses.asdict(options), template_sha256, version("jinja2")]
    return {"chat": _digest(settings)}


class InputHasher:
    """SHA-256 of one input, taken as it is read so that its pages are still in memory."""

    def __init__(self, source: Input) -> None:
        self._source = source
        self._hash = hashlib.sha256()
        self._at = 0

    def advance(self, position: int) -> None:
        """Take in a plain JSONL file up to `position`."""
        if self._source.kind != "jsonl":
            return
        with Path(self._source.path).open("rb", buffering=0) as stream:
            stream.seek(self._at)
            while self._at < position and (chunk := stream.read(min(2**18, position - self._at))):
                self._hash.update(chunk)
                self._at += len(chunk)

    def refuse_change(self) -> None:
        """Raise PipelineError if a file is not what it was when the run began."""
        if not os.path.isfile(self._source.path):
            return
        status = os.stat(self._source.path)
        if (status.st_size, status.st_mtime_ns) != (self._source.num_bytes, self._source.mtime_ns):
            raise PipelineError(
                f"{self._source.path} was changed while it was read; run the command again when "
                "nothing writes to it"
            )

    def finish(self) -> str | None:
        """Return the hash: of a file its bytes; of a folder its files' names and hashes.

        None for a dataset that lies on a hub.
        """
        path = (
            self._source.path.partition(":")[0] if self._source.kind == "hf" else self._source.path
        )
        if os.path.isdir(path):
            for file in walk_files(path):
                self._hash.update(f"{os.path.relpath(file, path)}\0{_file_hash(file)}\0".encode())
        elif not os.path.isfile(path):
            return None
        elif self._source.kind == "jsonl":
            self.advance(self._source.num_bytes)
        else:
            return _file_hash(path)
        return self._hash.hexdigest()


def _file_hash(path: str) -> str:
    digest = hashlib.sha256()
    for chunk in read_chunks(Path(path)):
        digest.update(chunk)
    return digest.hexdigest()


def _digest(content: object) -> str:
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()
