"""The token ids that every certificate compares log-probabilities on."""

from __future__ import annotations

import hashlib
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


def certificate_rows(folder: Path, model: ModelConfig) -> tuple[list[list[int]], str | None]:
    """Return the rows of a folder, and why none passes the context that YaRN stretches.

    The texts above in the folder's tokens, or, if its tokenizer has hardly any, ids that a hash
    draws from the whole vocabulary.
    """
    lengths, reason = LENGTHS, None
    context = model.original_max_position_embeddings
    if model.rotary_scaling_factor == 1 or context is None:
        reason = "positions are not stretched"
    elif context > MAX_CONTEXT_TOKENS:
        reason = (
            f"the original context of {context} tokens is longer than the {MAX_CONTEXT_TOKENS} "
            "of these rows; give longer ones by prompts=FILE"
        )
    else:
        lengths = (*LENGTHS, context + PAST_CONTEXT_TOKENS)
    ids = cycle(_text_ids(folder) or _drawn_ids(model.vocab_size, sum(lengths)))
    return [list(islice(ids, length)) for length in lengths], reason


def _text_ids(folder: Path) -> list[int]:
    """Return the texts as ids; nothing if they are too few different ones."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [i for text in TEXTS for i in tokenizer.encode(text, add_special_tokens=False).ids]
    return ids if len(set(ids)) >= MIN_DISTINCT_IDS else []


def _drawn_ids(vocab_size: int, count: int) -> list[int]:
    """Return ids below `vocab_size`, the same on every machine."""
    return [
        int.from_bytes(hashlib.sha256(f"row {number}".encode()).digest()[:8]) % vocab_size
        for number in range(count)
    ]
