"""The referee: HF `tokenizers` looks at a sample of what the fast encoder made."""

from collections.abc import Iterator

import numpy as np

from data_pipeline.sources import Input, Row, SourceOptions, plan_blocks, read_block
from data_pipeline.tokenization.encode_block import PROBED_FRACTION, EncodedBlock
from data_pipeline.tokenization.encoders import Encoder
from data_pipeline.tokenization.journal import Commit

FIRST_DOCUMENTS = 64
"""Checked before the first block is encoded; PROBED_FRACTION of the text after that."""
BLOCK_BYTES = 2**22


class Disagreement(Exception):
    """The fast encoder made other ids than the reference."""


def check_first_documents(
    inputs: list[Input], options: SourceOptions, fast: Encoder, reference: Encoder
) -> int:
    """Return how many documents of the first blocks were checked: FIRST_DOCUMENTS if there are.

    They are spread over the shorter half of a block: the reference takes half a second a megabyte,
    and long documents are among the probes.

    Raises:
        Disagreement: names the text.
    """
    num_checked = 0
    for texts in _blocks_of_texts(inputs, options):
        wanted = FIRST_DOCUMENTS - num_checked
        if not wanted:
            break
        step = max(1, len(texts) // 2 // wanted)
        chosen = sorted(texts, key=len)[: wanted * step : step]
        for text, ids in zip(chosen, fast.encode(chosen), strict=True):
            _compare(text, ids, reference)
        num_checked += len(chosen)
    return num_checked


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


def _blocks_of_texts(inputs: list[Input], options: SourceOptions) -> Iterator[list[str]]:
    """Yield the texts of each block, passing over faults: the encoding run deals with them."""
    for source in inputs:
        for block in plan_blocks(source, options, BLOCK_BYTES):
            items, _ = read_block(block, options)
            yield [item.text for item in items if isinstance(item, Row) and item.text]
