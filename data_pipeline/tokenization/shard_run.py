"""One pass over the inputs of a shard, from its last commit on."""

import copy
import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.chat.encoder import open_chat_encoder
from data_pipeline.chat.options import ChatOptions
from data_pipeline.config import PipelineError
from data_pipeline.shard_writer import ShardFiles, TokenizerRecord, remove_partial
from data_pipeline.sources import Block, FaultTally, Input, SourceOptions, plan_blocks
from data_pipeline.tokenization.encode_block import (
    EncodedBlock,
    Encoding,
    encode_block,
    join_names,
)
from data_pipeline.tokenization.encode_chat import encode_chat_block
from data_pipeline.tokenization.encoders import ReferenceEncoder
from data_pipeline.tokenization.fingerprints import InputHasher
from data_pipeline.tokenization.journal import Commit, Job, Journal
from data_pipeline.tokenization.names import count_duplicates
from data_pipeline.tokenization.progress import Progress
from data_pipeline.tokenization.referee import check_first_documents, check_probes
from data_pipeline.tokenization.workers import EncodeBlock, Workers

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """What a run makes, and of what."""

    prefix: Path
    inputs: list[Input]
    options: SourceOptions
    tokenizer: TokenizerRecord
    job: Job
    tokenizer_path: Path
    workers: int
    block_bytes: int
    commit_bytes: int
    refuse_duplicate_ids: bool
    chat: ChatOptions | None = None
    """Of conversations; None for text."""

    def encoding(self, *, fast: bool) -> Encoding:
        """Return how workers encode."""
        eos = self.tokenizer.eos_token_id
        dtype = self.tokenizer.dtype
        return Encoding(self.tokenizer_path, fast, eos, dtype, self.options, self.chat)


class ShardRun:
    """One pass over the inputs, from a commit on."""

    def __init__(self, shard: Shard, journal: Journal) -> None:
        self._shard, self._journal = shard, journal
        self._commit = copy.deepcopy(journal.commit)
        self._files = ShardFiles(
            shard.prefix,
            shard.tokenizer.dtype,
            self._commit.size,
            masked=shard.chat is not None,
        )
        self._tally = FaultTally(shard.options, self._commit.skipped)
        self._hasher: InputHasher | None = None

    def run(self) -> None:
        """Append all documents that are left, then index and manifest."""
        encoding = self._shard.encoding(fast=self._journal.fallback is None)
        try:
            with Workers(_block_encoder(encoding), self._shard.workers) as workers:
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
            checked = check_first_documents(inputs, self._shard.options, fast, reference)
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
        block_bytes = self._shard.block_bytes
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
        self._files.append(encoded.tokens, encoded.lengths, names, encoded.mask)
        commit.chat = dict(Counter(commit.chat) + Counter(encoded.chat))
        commit.size.max_token_id = max(commit.size.max_token_id, encoded.max_token_id)
        commit.skipped = dict(self._tally.counts)
        commit.rows += encoded.num_rows
        commit.block += 1
        self._hasher = self._hasher or InputHasher(source)
        self._hasher.advance(block.position_bytes)
        if num_bytes - self._saved_bytes() >= self._shard.commit_bytes:
            self._save()

    def _close_inputs(self, index: int) -> None:
        """Record the inputs before `index` as read to their end."""
        commit = self._commit
        while commit.input < index:
            source = self._shard.inputs[commit.input]
            hasher = self._hasher or InputHasher(source)
            hasher.refuse_change()
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
        if self._shard.chat is not None:
            extra["chat"] = commit.chat | {"options": dataclasses.asdict(self._shard.chat)}
        self._files.finish(self._shard.tokenizer, extra)
        commit.finished = True
        self._journal.write(commit)

    def _count_duplicates(self) -> int:
        path = self._files.partial("ids")
        count, examples = count_duplicates(path, self._commit.size.documents)
        if not count:
            return 0
        message = f"{count} ids occur again, e.g. {', '.join(examples)}"
        if self._shard.refuse_duplicate_ids:
            raise PipelineError(
                f"output={self._shard.prefix}: {message}; make them unique, or give "
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


def _block_encoder(encoding: Encoding) -> EncodeBlock:
    if encoding.chat is None:
        return functools.partial(encode_block, encoder=encoding.open(), encoding=encoding)
    chat_encoder = open_chat_encoder(encoding.tokenizer.parent, encoding.chat)
    return functools.partial(encode_chat_block, encoder=chat_encoder, encoding=encoding)
