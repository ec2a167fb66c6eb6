"""The referee: HF `tokenizers` looks at a sample of what the fast encoder made."""

import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from data_pipeline.sources import Input, Row, SourceOptions, plan_blocks, read_block
from data_pipeline.tokenization.encode_block import PROBED_FRACTION, EncodedBlock
from data_pipeline.tokenization.encoders import Encoder
from data_pipeline.tokenization.journal import Commit

FIRST_DOCUMENTS = 64
"""Checked before the first block is encoded; PROBED_FRACTION of the text after that."""
BLOCK_BYTES = 2**20


class Disagreement(Exception):
    """The fast encoder made other ids than the reference."""


def check_first_documents(
    inputs: list[Input], options: SourceOptions, fast: Encoder, reference: Encoder
) -> tuple[int, int]:
    """Return (documents, characters) checked: the first FIRST_DOCUMENTS, or all if fewer.

    Raises:
        Disagreement: names the text.
    """
    num_characters = num_documents = 0
    for text in itertools.islice(_texts(inputs, options), FIRST_DOCUMENTS):
        _compare(text, fast.encode([text])[0], reference)
        num_documents += 1
        num_characters += len(text)
    return num_documents, num_characters


def check_probes(
    encoded: EncodedBlock, dtype: np.dtype, commit: Commit, reference: Encoder
) -> None:
    """Compare probes of a block as long as less than PROBED_FRACTION of all text was.

    Raises:
        Disagreement: names the text.
    """
    ends = np.cumsum(encoded.lengths, dtype=np.int64)
    tokens = np.frombuffer(encoded.tokens, dtype=dtype)
    for index, text in encoded.probes:
        if commit.referee_characters >= PROBED_FRACTION * commit.characters:
            return
        start = int(ends[index] - encoded.lengths[index])
        _compare(text, tokens[start : int(ends[index]) - 1], reference)
        commit.referee_documents += 1
        commit.referee_characters += len(text)


def _compare(text: str, ids: np.ndarray, reference: Encoder) -> None:
    expected = reference.encode([text])[0]
    if not np.array_equal(ids, expected):
        raise Disagreement(
            f"gigatoken makes {len(ids)} ids and tokenizers {len(expected)}, or other ones, of a "
            f"text of {len(text)} characters that begins {text[:40]!r}"
        )


def _texts(inputs: Iterable[Input], options: SourceOptions) -> Iterator[str]:
    """Yield texts in order, passing over faults: the encoding run deals with them."""
    for source in inputs:
        for block in plan_blocks(source, options, BLOCK_BYTES):
            items, _ = read_block(block, options)
            yield from (item.text for item in items if isinstance(item, Row) and item.text)
