"""Tokenize documents or conversations into a Megatron shard: `python -m data_pipeline.tokenize`.

Documents keep the order of the source; each ends with `<|endoftext|>`. The bytes do not depend on
the number of workers, and not on how often the command was killed and run again: what a journal has
committed is kept. Sources: data_pipeline.sources.inputs; guarantees: docs/data-tokenization.md.
"""

import dataclasses
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from data_pipeline.chat.encoder import open_chat_encoder
from data_pipeline.chat.options import ChatOptions, parse_template_arguments
from data_pipeline.chat.template import read_chat_template
from data_pipeline.config import PipelineError, run_command
from data_pipeline.shard_writer import publish
from data_pipeline.sources import (
    MEBIBYTE,
    SourceOptions,
    find_inputs,
)
from data_pipeline.tokenization.encoders import (
    open_fast_encoder,
    read_tokenizer_record,
)
from data_pipeline.tokenization.fingerprints import describe_chat, describe_job
from data_pipeline.tokenization.journal import Commit, Journal, locked
from data_pipeline.tokenization.referee import Disagreement
from data_pipeline.tokenization.shard_run import Shard, ShardRun

logger = logging.getLogger(__name__)

DUPLICATE_IDS = ("count", "refuse")
FORMATS = ("text", "chat")
CHAT_KEYS = ("template_arguments", "on_rewrite", "max_tokens", "on_long")
"""Arguments that only conversations have."""
CHAT_ENCODER = "conversations need their special tokens"


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
    block_kb: int = 1024
    """Read at once by a worker."""
    commit_mb: int = 64
    """Of tokens after which they are synced: what a kill can cost."""
    format: str = "text"
    """`text`, or `chat`: records have `messages`, and OUTPUT.mask is written too."""
    template_arguments: str = ""
    """Of chat: JSON object of the template's variables."""
    on_rewrite: str = "refuse"
    """Of chat: where a template rewrites earlier turns, `refuse`, or `split` the turns apart."""
    max_tokens: int = 0
    """Of chat: of a sample; 0 for any number."""
    on_long: str = "refuse"
    """Of chat: `refuse` a longer sample, or `drop` and count it."""


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
    try:
        with locked(shard.prefix):
            if _is_done(shard):
                logger.info("%s: is there already, of the same inputs: nothing to do", shard.prefix)
                return
            manifest = _write(shard)
    except OSError as error:
        raise PipelineError(
            f"output={shard.prefix}: {error}; what was committed is kept: remove the cause (a full "
            "disk?) and run the same command again to go on from there"
        ) from None
    except KeyboardInterrupt:
        raise PipelineError(
            f"output={shard.prefix}: interrupted; run the same command again to go on"
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
        messages=arguments.format == "chat",
    )
    chat = _chat_options(arguments)
    inputs = find_inputs(arguments.input)
    tokenizer_path = Path(arguments.tokenizer) / "tokenizer.json"
    record = read_tokenizer_record(tokenizer_path)
    job = describe_job(inputs, record, options, arguments.block_kb)
    if chat is not None:
        open_chat_encoder(tokenizer_path.parent, chat)  # refuses what cannot work, before any file
        job |= describe_chat(chat, read_chat_template(tokenizer_path.parent).sha256)
    return Shard(
        prefix=Path(arguments.output),
        inputs=inputs,
        options=options,
        tokenizer=record,
        job=job,
        tokenizer_path=tokenizer_path,
        workers=arguments.workers,
        block_bytes=arguments.block_kb * 1024,
        commit_bytes=arguments.commit_mb * MEBIBYTE,
        refuse_duplicate_ids=arguments.duplicate_ids == "refuse",
        chat=chat,
    )


def _chat_options(arguments: Tokenize) -> ChatOptions | None:
    """Return how conversations are rendered; None for text."""
    if arguments.format not in FORMATS:
        raise PipelineError(f"format={arguments.format} is unknown; choose {' or '.join(FORMATS)}")
    if arguments.format == "chat":
        return ChatOptions(
            template_arguments=parse_template_arguments(arguments.template_arguments),
            on_rewrite=arguments.on_rewrite,
            max_tokens=arguments.max_tokens,
            on_long=arguments.on_long,
        )
    for field in dataclasses.fields(arguments):
        if field.name in CHAT_KEYS and (value := getattr(arguments, field.name)) != field.default:
            raise PipelineError(
                f"{field.name}={value} says how conversations are read, but format=text; give "
                "format=chat, or leave it out"
            )
    return None


def _is_done(shard: Shard) -> bool:
    """Return whether a whole shard of the same job is in place."""
    prefix = shard.prefix
    if Path(f"{prefix}.journal").exists():
        return False
    suffixes = ("json", "bin", "ids", "idx", *(["mask"] if shard.chat is not None else []))
    if not all(Path(f"{prefix}.{suffix}").exists() for suffix in suffixes):
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
        encoder = CHAT_ENCODER if shard.chat else open_fast_encoder(shard.tokenizer_path)
        if isinstance(encoder, str):
            journal.restart(shard.job, encoder)
    elif journal.commit != Commit():
        logger.info("%s: going on after document %d", shard.prefix, journal.commit.size.documents)
    if journal.fallback is not None and shard.chat is None:
        logger.warning("encoding with tokenizers, not gigatoken: %s", journal.fallback)
    try:
        ShardRun(shard, journal).run()
    except Disagreement as error:
        logger.warning("%s; starting over with tokenizers", error)
        journal.restart(shard.job, str(error))
        ShardRun(shard, journal).run()


if __name__ == "__main__":
    sys.exit(main())
