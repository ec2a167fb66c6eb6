"""Tokenize documents into a Megatron shard: `python -m data_pipeline.tokenize`.

Documents keep the order of the source; each ends with `<|endoftext|>`. The bytes do not depend on
the number of workers, and not on how often the command was killed and run again: what a journal has
committed is kept. Sources: data_pipeline.sources.inputs; guarantees: docs/data-tokenization.md.
"""

import copy
import dataclasses
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.config import PipelineError, run_command
from data_pipeline.shard_writer import ShardFiles, TokenizerRecord, publish, remove_partial
from data_pipeline.sources import (
    MEBIBYTE,
    Block,
    FaultTally,
    Input,
    SourceOptions,
    find_inputs,
    plan_blocks,
)
from data_pipeline.tokenization.encode_block import (
    EncodedBlock,
    Encoding,
    encode_block,
    join_names,
)
from data_pipeline.tokenization.encoders import (
    ReferenceEncoder,
    read_tokenizer_record,
    why_not_fast,
)
from data_pipeline.tokenization.fingerprints import InputHasher, describe_job
from data_pipeline.tokenization.journal import Commit, Job, Journal, locked
from data_pipeline.tokenization.names import count_duplicates
from data_pipeline.tokenization.progress import Progress
from data_pipeline.tokenization.referee import Disagreement, check_first_documents, check_probes
from data_pipeline.tokenization.workers import Workers

logger = logging.getLogger(__name__)

DUPLICATE_IDS = ("count", "refuse")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenize:
    """Arguments."""

    input: str
    """Files, quoted globs, folders or hf:NAME, separated by commas."""
    tokenizer: str
    """Folder with tokenizer.json."""
    output: str
    """Prefix: OUTPUT.bin, .idx, .json and .ids are written."""
    workers: int = 1
    """Processes."""
    text_key: str = "text"
    id_key: str = "id"
    on_error: str = "refuse"
    """`refuse` the first record that is no document, or `skip` and count such records."""
    duplicate_ids: str = "count"
    """`count` ids that occur again, or `refuse` them."""
    max_document_mb: int = 64
    """A longer line or file is an error."""
    block_kb: int = 4096
    """Read at once by a worker."""
    commit_mb: int = 64
    """Of tokens after which they are synced: what a kill can cost."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """What a run makes, and of what."""

    prefix: Path
    inputs: list[Input]
    options: SourceOptions
    tokenizer: TokenizerRecord
    job: Job
    arguments: Tokenize

    def encoding(self, *, fast: bool) -> Encoding:
        """Return how workers encode."""
        path = Path(self.arguments.tokenizer) / "tokenizer.json"
        eos = self.tokenizer.eos_token_id
        return Encoding(path, fast, eos, self.tokenizer.dtype, self.options)


def main() -> int:
    """Write the shard and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command(Tokenize, tokenize)


def tokenize(arguments: Tokenize) -> None:
    """Write OUTPUT.bin, .idx, .json and .ids, or finish what a killed run began.

    Raises:
        PipelineError: wrong arguments, a record that is no document, a full disk, or another run
            on the same output.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one thread a worker
    shard = _plan(arguments)
    start_s = time.monotonic()
    with locked(shard.prefix):
        if _is_done(shard):
            logger.info("%s: is there already, of the same inputs: nothing to do", shard.prefix)
            return
        try:
            manifest = _write(shard)
        except OSError as error:
            raise PipelineError(
                f"output={shard.prefix}: {error}; what was committed is kept: remove the cause "
                "(a full disk?) and run the same command again to go on from there"
            ) from None
    logger.info(
        "%s: %d documents, %d tokens in %.1f s; skipped: %s",
        *(shard.prefix, manifest["documents"], manifest["tokens"], time.monotonic() - start_s),
        manifest["skipped"] or "nothing",
    )


def _plan(arguments: Tokenize) -> Shard:
    for key in ("workers", "block_kb", "commit_mb"):
        if (value := getattr(arguments, key)) < 1:
            raise PipelineError(f"{key}={value} is below 1; give a positive number")
    if arguments.duplicate_ids not in DUPLICATE_IDS:
        raise PipelineError(
            f"duplicate_ids={arguments.duplicate_ids} is unknown; choose from {DUPLICATE_IDS}"
        )
    options = SourceOptions(
        text_key=arguments.text_key,
        id_key=arguments.id_key,
        on_error=arguments.on_error,
        max_document_bytes=arguments.max_document_mb * MEBIBYTE,
        text_only=True,
    )
    inputs = find_inputs(arguments.input)
    record = read_tokenizer_record(Path(arguments.tokenizer) / "tokenizer.json")
    job = describe_job(inputs, record, options, arguments.block_kb)
    return Shard(Path(arguments.output), inputs, options, record, job, arguments)


def _is_done(shard: Shard) -> bool:
    """Return whether a whole shard of the same job is in place."""
    prefix = shard.prefix
    if Path(f"{prefix}.journal").exists():
        return False
    if not all(Path(f"{prefix}.{suffix}").exists() for suffix in ("json", "bin", "ids", "idx")):
        return False
    try:
        manifest = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
        num_bytes = manifest["tokens"] * shard.tokenizer.dtype.itemsize
        return (
            manifest.get("job") == shard.job and Path(f"{prefix}.bin").stat().st_size == num_bytes
        )
    except (ValueError, KeyError, AttributeError, TypeError):
        return False


def _write(shard: Shard) -> dict[str, Any]:
    """Write the shard from its last commit on and return the manifest."""
    journal = Journal(Path(f"{shard.prefix}.journal"), shard.job)
    if journal.left_over:
        logger.warning(
            "%s: an unfinished run with another %s is discarded; starting over",
            *(shard.prefix, ", ".join(journal.left_over)),
        )
    if not journal.commit.finished:
        _encode_to_end(shard, journal)
    publish(shard.prefix)
    journal.remove()
    return json.loads(Path(f"{shard.prefix}.json").read_text(encoding="utf-8"))


def _encode_to_end(shard: Shard, journal: Journal) -> None:
    """Encode what is left; once more, by the reference, if the fast encoder proves wrong."""
    if journal.commit == Commit() and journal.fallback is None:
        path = Path(shard.arguments.tokenizer) / "tokenizer.json"
        if reason := why_not_fast(path):
            journal.restart(shard.job, reason)
    elif journal.commit != Commit():
        logger.info("%s: going on after document %d", shard.prefix, journal.commit.size.documents)
    if journal.fallback is not None:
        logger.warning("encoding with tokenizers, not gigatoken: %s", journal.fallback)
    try:
        ShardRun(shard, journal).run()
    except Disagreement as error:
        logger.warning("%s; starting over with tokenizers", error)
        journal.restart(shard.job, str(error))
        ShardRun(shard, journal).run()


class ShardRun:
    """One pass over the inputs, from a commit on."""

    def __init__(self, shard: Shard, journal: Journal) -> None:
        self._shard, self._journal = shard, journal
        self._commit = copy.deepcopy(journal.commit)
        self._files = ShardFiles(shard.prefix, shard.tokenizer.dtype, self._commit.size)
        self._tally = FaultTally(shard.options, self._commit.skipped)
        self._hasher: InputHasher | None = None

    def run(self) -> None:
        """Append all documents that are left, then index and manifest."""
        encoding = self._shard.encoding(fast=self._journal.fallback is None)
        encode = functools.partial(encode_block, encoder=encoding.open(), encoding=encoding)
        try:
            with Workers(encode, self._shard.arguments.workers) as workers:
                self._append_all(workers, encoding)
            self._finish()
        except PipelineError:
            self._save()
            raise
        finally:
            self._files.close()

    def _append_all(self, workers: Workers, encoding: Encoding) -> None:
        reference = ReferenceEncoder(encoding.tokenizer) if encoding.fast else None
        commit, inputs = self._commit, self._shard.inputs
        blocks = workers.encode(self._blocks())
        if reference and commit == Commit():
            fast = encoding.open()
            checked, _ = check_first_documents(inputs, self._shard.options, fast, reference)
            commit.referee_first_documents = checked
        total = sum(source.num_bytes for source in inputs)
        before = sum(source.num_bytes for source in inputs[: commit.input])
        with Progress(self._shard.prefix.name, total, before) as progress:
            for index, block, encoded in blocks:
                self._close_inputs(index)
                self._append(block, encoded, reference)
                done = sum(s.num_bytes for s in inputs[:index]) + block.position_bytes
                progress.update(done, len(encoded.lengths), len(encoded.tokens))
        self._close_inputs(len(inputs))

    def _blocks(self) -> Iterator[tuple[int, Block, int]]:
        """Yield (input index, block, a number of its own) from the commit on."""
        block_bytes = self._shard.arguments.block_kb * 1024
        start = (self._commit.input, self._commit.block)
        for index, source in enumerate(self._shard.inputs):
            if index < start[0]:
                continue
            first = start[1] if index == start[0] else 0
            blocks = plan_blocks(source, self._shard.options, block_bytes, first)
            for number, block in enumerate(blocks, start=first):
                yield index, block, index + number

    def _append(
        self, block: Block, encoded: EncodedBlock, reference: ReferenceEncoder | None
    ) -> None:
        commit = self._commit
        source = self._shard.inputs[commit.input]
        for fault in encoded.faults:
            self._tally.add(fault, f"{source.path}:{commit.rows + fault.number}")
        commit.characters += encoded.num_characters
        if reference:
            check_probes(encoded, self._shard.tokenizer.dtype, commit, reference)
        names = join_names(encoded.names, source.name, commit.rows)
        num_bytes = commit.size.tokens * self._shard.tokenizer.dtype.itemsize
        self._files.append(encoded.tokens, encoded.lengths, names)
        commit.size.max_token_id = max(commit.size.max_token_id, encoded.max_token_id)
        commit.skipped = dict(self._tally.counts)
        commit.rows += encoded.num_rows
        commit.block += 1
        self._hasher = self._hasher or InputHasher(source)
        self._hasher.advance(block.position_bytes)
        if num_bytes - self._saved_bytes() >= self._shard.arguments.commit_mb * MEBIBYTE:
            self._save()

    def _close_inputs(self, index: int) -> None:
        """Record the inputs before `index` as read to their end."""
        commit = self._commit
        while commit.input < index:
            source = self._shard.inputs[commit.input]
            hasher = self._hasher or InputHasher(source)
            entry = {
                "name": source.name,
                "kind": source.kind,
                "bytes": source.num_bytes,
                "sha256": hasher.finish(),
                "first_document": commit.first_document,
                "documents": commit.size.documents - commit.first_document,
            }
            commit.closed_inputs.append(entry)
            commit.first_document = commit.size.documents
            commit.input, commit.block, commit.rows = commit.input + 1, 0, 0
            self._hasher = None

    def _saved_bytes(self) -> int:
        return self._journal.commit.size.tokens * self._shard.tokenizer.dtype.itemsize

    def _save(self) -> None:
        self._files.sync()
        self._journal.write(self._commit)

    def _finish(self) -> None:
        commit = self._commit
        if not commit.size.documents:
            remove_partial(self._shard.prefix)
            self._journal.remove()
            raise PipelineError(
                f"{self._shard.prefix}: no document to write; the input has no text "
                f"(skipped: {commit.skipped or 'nothing'})"
            )
        self._save()
        extra = {
            "inputs": commit.closed_inputs,
            "skipped": commit.skipped,
            "duplicate_ids": self._count_duplicates(),
            "encoder": self._encoder_entry(),
            "job": self._shard.job,
        }
        self._files.finish(self._shard.tokenizer, extra)
        commit.finished = True
        self._journal.write(commit)

    def _count_duplicates(self) -> int:
        path = self._files.partial("ids")
        count, examples = count_duplicates(path, self._commit.size.documents)
        if not count:
            return 0
        message = f"{count} ids occur again, e.g. {', '.join(examples)}"
        if self._shard.arguments.duplicate_ids == "refuse":
            raise PipelineError(
                f"input={self._shard.arguments.input}: {message}; make them unique, or give "
                "duplicate_ids=count to keep such documents"
            )
        logger.warning("%s", message)
        return count

    def _encoder_entry(self) -> dict[str, Any]:
        if self._journal.fallback is not None:
            return {"name": "tokenizers", "reason": self._journal.fallback}
        commit = self._commit
        return {
            "name": "gigatoken",
            "first_documents_checked": commit.referee_first_documents,
            "later_documents_checked": commit.referee_documents,
            "later_characters_checked": commit.referee_characters,
        }


if __name__ == "__main__":
    sys.exit(main())
