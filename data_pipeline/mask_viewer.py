"""Show what of a conversation is trained: `python -m data_pipeline.mask_viewer`.

Either a document of a shard (`shard=PREFIX document=N`) or a line of a source that is not tokenized
yet (`input=FILE line=N`, rendered and encoded as data_pipeline.tokenize would).
"""

import dataclasses
import json
import struct
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data_pipeline.chat.encoder import open_chat_encoder
from data_pipeline.chat.options import ChatFault, ChatOptions, parse_template_arguments
from data_pipeline.chat.views import View, to_html, to_terminal
from data_pipeline.config import PipelineError, run_command
from data_pipeline.documents import file_sha256
from data_pipeline.shard_writer import INDEX_HEADER
from data_pipeline.sources import Fault, Row, SourceOptions, find_inputs, plan_blocks, read_block
from data_pipeline.tokenization.encoders import read_tokenizer_record

BLOCK_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskViewer:
    """Arguments."""

    tokenizer: str
    """Folder with tokenizer.json; with `input` also the chat template."""
    shard: str = ""
    """Prefix of a shard that was written with format=chat."""
    document: int = 0
    """Of the shard, from 0."""
    input: str = ""
    """File of conversations."""
    line: int = 1
    """Line or row of the file, from 1."""
    html: str = ""
    """Write a page to this file instead."""
    template_arguments: str = ""
    """As of data_pipeline.tokenize."""
    on_rewrite: str = "refuse"
    """As of data_pipeline.tokenize."""


def main() -> int:
    """Show the sample and return the exit status."""
    return run_command(MaskViewer, view_mask)


def view_mask(arguments: MaskViewer) -> None:
    """Write one document, or all samples of one line, to the terminal or to a page.

    Raises:
        PipelineError: no such document or line, no conversation, or another tokenizer.
    """
    if bool(arguments.shard) == bool(arguments.input):
        raise PipelineError(
            f"shard={arguments.shard} and input={arguments.input}: one of them is wanted; give "
            "shard=PREFIX document=N or input=FILE line=N"
        )
    path = Path(arguments.tokenizer) / "tokenizer.json"
    read_tokenizer_record(path)
    views = [_of_shard(arguments, path)] if arguments.shard else _of_line(arguments)
    tokenizer = Tokenizer.from_file(str(path))
    if arguments.html:
        Path(arguments.html).write_text(to_html(views, tokenizer), encoding="utf-8")
        return
    for view in views:
        sys.stdout.write(to_terminal(view, tokenizer, colors=sys.stdout.isatty()))


def _of_shard(arguments: MaskViewer, tokenizer: Path) -> View:
    prefix, number = arguments.shard, arguments.document
    manifest = _read_manifest(prefix)
    if "mask_sha256" not in manifest:
        raise PipelineError(
            f"shard={prefix} has no loss mask: every token is trained; write one with "
            "data_pipeline.tokenize format=chat"
        )
    if manifest["tokenizer"]["sha256"] != file_sha256(tokenizer):
        raise PipelineError(
            f"tokenizer={tokenizer.parent} is not the one that made shard={prefix}; give that one"
        )
    if not 0 <= number < manifest["documents"]:
        raise PipelineError(
            f"document={number} is not in shard={prefix}; choose 0 to {manifest['documents'] - 1}"
        )
    length, offset = _place_of(prefix, number, manifest["documents"])
    dtype = np.dtype(manifest["dtype"])
    ids = np.fromfile(f"{prefix}.bin", dtype, count=length, offset=offset)
    first = offset // dtype.itemsize
    trained = np.fromfile(f"{prefix}.mask", np.bool_, count=length, offset=first)
    with Path(f"{prefix}.ids").open(encoding="utf-8") as names:
        name = json.loads(next(islice(names, number, None)))
    return View(f"{prefix}, document {number}, {name}", ids.tolist(), trained.tolist())


def _read_manifest(prefix: str) -> dict[str, Any]:
    try:
        return json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"shard={prefix}: its manifest {prefix}.json cannot be read ({error}); give the prefix "
            "of a shard"
        ) from None


def _place_of(prefix: str, number: int, documents: int) -> tuple[int, int]:
    """Return the tokens of a document and the bytes before it, as the index states them."""
    start = len(INDEX_HEADER) + struct.calcsize("<QBQQ")
    with Path(f"{prefix}.idx").open("rb") as index:
        index.seek(start + 4 * number)
        (length,) = struct.unpack("<i", index.read(4))
        index.seek(start + 4 * documents + 8 * number)
        (offset,) = struct.unpack("<q", index.read(8))
    return length, offset


def _of_line(arguments: MaskViewer) -> list[View]:
    options = ChatOptions(
        template_arguments=parse_template_arguments(arguments.template_arguments),
        on_rewrite=arguments.on_rewrite,
    )
    encoder = open_chat_encoder(Path(arguments.tokenizer), options)
    where = f"{arguments.input}:{arguments.line}"
    item = _find_line(arguments)
    if isinstance(item, Fault):
        raise PipelineError(f"{where} {item.detail} [{item.reason}]; repair it")
    try:
        samples = encoder.encode(item.record)
    except ChatFault as fault:
        raise PipelineError(f"{where} {fault.detail} [{fault.reason}]; repair it") from None
    titles = [where + ("" if s.turn is None else f", message {s.turn}") for s in samples]
    return [View(title, s.ids, s.trained) for title, s in zip(titles, samples, strict=True)]


def _find_line(arguments: MaskViewer) -> Row | Fault:
    inputs = find_inputs(arguments.input)
    if len(inputs) != 1:
        raise PipelineError(f"input={arguments.input} is {len(inputs)} files; give one of them")
    options = SourceOptions(messages=True, text_only=True)
    num_read = 0
    for block in plan_blocks(inputs[0], options, BLOCK_BYTES):
        items, count = read_block(block, options)
        for item in items:
            if num_read + item.number == arguments.line:
                return item
        num_read += count
    raise PipelineError(
        f"line={arguments.line} is not in {arguments.input}; it has 1 to {num_read}"
    )


if __name__ == "__main__":
    sys.exit(main())
