"""The token ids that every certificate compares log-probabilities on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from tokenizers import Tokenizer

from ring_train.config import ModelConfig

LENGTHS = (2, 63, 65, 130, 200)
"""Tokens of the rows; they end before, behind and far behind the 64 of a lightning chunk."""
PAST_CONTEXT_TOKENS = 72
MAX_CONTEXT_TOKENS = 4096
"""A longer original context is not passed: attention in plain torch would take hours."""
MIN_DISTINCT_IDS = 48
"""Texts that a tokenizer makes fewer ids of say too little about a vocabulary."""

TEXTS = (
    "The quick brown fox jumps over the lazy dog, twice on Sundays and never on 29 February.\n",
    "def gcd(a: int, b: int) -> int:\n    while b:\n        a, b = b, a % b\n    return a\n",
    "12 + 7 = 19\n3 * (4 - 11) = -21\n2^10 = 1024; sqrt(2) = 1.41421356...\n",
    "\u6211\u4eec\u4ece\u6570\u636e\u5230\u6a21\u578b\uff0c\u518d\u5230\u670d\u52a1\u3002\n",
    '{"name": "ring", "layers": [1, 2, 3], "linear": true, "note": null}\n',
    "Zwei Verfahren, ein Ergebnis: \u00e4\u00f6\u00fc\u00df, na\u00efve caf\u00e9, \U0001f600.\n",
)


def certificate_rows(folder: Path, model: ModelConfig) -> tuple[list[list[int]], Iterator[int]]:
    """Return the rows of a folder, one past the context that YaRN stretches, and ids of others.

    The texts above in the folder's tokens, or, if its tokenizer has hardly any, ids that a hash
    draws from the whole vocabulary.
    """
    lengths, context = LENGTHS, model.original_max_position_embeddings
    if model.rotary_scaling_factor != 1 and context is not None and context <= MAX_CONTEXT_TOKENS:
        lengths = (*LENGTHS, context + PAST_CONTEXT_TOKENS)
    ids = _text_ids(folder)
    if len(set(ids)) < MIN_DISTINCT_IDS or max(ids) >= model.vocab_size:
        ids = _drawn_ids(model.vocab_size, sum(lengths))
    stream = cycle(ids)
    return [list(islice(stream, length)) for length in lengths], stream


def _text_ids(folder: Path) -> list[int]:
    """Return the texts as ids, none without a tokenizer that can be read."""
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # tokenizers raises no narrower class; other checks name the file
        return []
    return [i for text in TEXTS for i in tokenizer.encode(text, add_special_tokens=False).ids]


def _drawn_ids(vocab_size: int, count: int) -> list[int]:
    """Return ids below `vocab_size`, the same on every machine."""
    return [
        int.from_bytes(hashlib.sha256(f"row {number}".encode()).digest()[:8]) % vocab_size
        for number in range(count)
    ]
