"""Tokenize documents into a Megatron shard: `python -m data_pipeline.tokenize`.

Documents keep the order of the input files, by name, and of their lines; each ends with
`<|endoftext|>`. The output does not depend on the number of workers.
"""

import dataclasses
import functools
import itertools
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from data_pipeline.config import PipelineError, run_command
from data_pipeline.documents import expand_glob, file_sha256, read_documents
from data_pipeline.shard_writer import TokenizerRecord, write_shard
from data_pipeline.special_tokens import EOS

logger = logging.getLogger(__name__)

BATCH_DOCUMENTS = 64
"""Documents handed to a worker at once."""
PROGRESS_INTERVAL_S = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenize:
    """Arguments."""

    input: str
    """Glob of JSONL files."""
    tokenizer: str
    """Folder with tokenizer.json."""
    output: str
    """Prefix: OUTPUT.bin, OUTPUT.idx and OUTPUT.json are written."""
    workers: int = 1
    """Processes."""


def main() -> int:
    """Write the shard and return the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command(Tokenize, tokenize)


def tokenize(arguments: Tokenize) -> None:
    """Write OUTPUT.bin, .idx and .json.

    Raises:
        PipelineError: no input, a line that is not a document, or a folder without a tokenizer.
    """
    paths = expand_glob(arguments.input)
    tokenizer_path = Path(arguments.tokenizer) / "tokenizer.json"
    record = read_tokenizer_record(tokenizer_path)
    texts = (d.text for path in paths for d in read_documents(path) if d.text)
    batches = iter(lambda: list(itertools.islice(texts, BATCH_DOCUMENTS)), [])
    if arguments.workers < 1:
        raise PipelineError(f"workers={arguments.workers} is below 1; give a number of processes")
    start_s = time.monotonic()
    inputs = [{"name": path.name, "sha256": file_sha256(path)} for path in paths]
    encode = functools.partial(_encode, tokenizer_path, record.eos_token_id)
    documents = itertools.chain.from_iterable(_mapped(encode, batches, arguments.workers))
    manifest = write_shard(Path(arguments.output), _logged(documents), record, {"inputs": inputs})
    logger.info(
        "%s: %d documents, %d tokens in %.1f s",
        *(arguments.output, manifest["documents"], manifest["tokens"], time.monotonic() - start_s),
    )


def read_tokenizer_record(path: Path) -> TokenizerRecord:
    """Return the fingerprint, size and end-of-text id of a tokenizer.json."""
    if not path.is_file():
        raise PipelineError(f"{path} does not exist; give tokenizer=FOLDER with a tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    eos_token_id = tokenizer.token_to_id(EOS)
    if eos_token_id is None:
        raise PipelineError(f"{path} has no {EOS}; train one with data_pipeline.train_tokenizer")
    return TokenizerRecord(file_sha256(path), tokenizer.get_vocab_size(), eos_token_id)


def _mapped[T, R](function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Yield function(item) in order, computed by as many processes."""
    if workers == 1:
        yield from map(function, items)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(function, items)


def _encode(tokenizer_path: Path, eos_token_id: int, texts: list[str]) -> list[np.ndarray]:
    """Return the ids of each text and the end-of-text id. Control tokens in text stay text."""
    encodings = _open_tokenizer(tokenizer_path).encode_batch_fast(texts, add_special_tokens=False)
    return [np.array([*encoding.ids, eos_token_id], dtype=np.int32) for encoding in encodings]


@functools.cache
def _open_tokenizer(path: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.encode_special_tokens = True  # `<|endoftext|>` inside a source file is not an end
    return tokenizer


def _logged(documents: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the documents unchanged and log a line of progress now and then."""
    start_s = last_s = time.monotonic()
    num_tokens = 0
    for number, document in enumerate(documents, start=1):
        yield document
        num_tokens += len(document)
        now_s = time.monotonic()
        if now_s - last_s > PROGRESS_INTERVAL_S:
            last_s = now_s
            rate = num_tokens / (now_s - start_s)
            logger.info("%d documents, %d tokens, %.0f tokens/s", number, num_tokens, rate)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker
    sys.exit(main())
