"""Text to ids: gigatoken where its ids are known to be those of HF `tokenizers`, else the latter.

Both leave control tokens that occur in a text as text: a page about `<|endoftext|>` ends no
document. Added tokens that are not special (`<think>`) are single ids in both.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import gigatoken
import numpy as np
import orjson
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from data_pipeline.config import PipelineError
from data_pipeline.documents import file_sha256
from data_pipeline.shard_writer import TokenizerRecord
from data_pipeline.special_tokens import EOS
from data_pipeline.tokenization.memory import release_freed_memory, resident_bytes

PLAIN_BPE = {
    "dropout": (None, 0.0),
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (None, False),
    "byte_fallback": (None, False),
    "ignore_merges": (None, False),
}
"""Settings of a BPE model under which both libraries are compared, and their allowed values."""


CACHE_BYTES = 32 * 2**20
"""How much a process may grow before the fast encoder is made to forget."""


class Encoder(Protocol):
    """Text to ids, without special tokens around it."""

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        ...


class FastEncoder:
    """gigatoken on one thread.

    Its `encode` of one text is used: the batch form answers in awkward arrays, whose import costs
    a second, and is no faster. It remembers every word it has seen, without bound (gigatoken 0.10):
    after CACHE_BYTES it is loaded anew, which takes a third of a second.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Load what a tokenizer.json says, without its special tokens."""
        texts = [token for token in config["added_tokens"] if not token["special"]]
        self._json = orjson.dumps({**config, "added_tokens": texts})
        self._encode = self._load()
        self._least_bytes = 0

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        ids = list(map(self._encode, texts))
        held_bytes = resident_bytes()
        self._least_bytes = min(self._least_bytes or held_bytes, held_bytes)
        if held_bytes - self._least_bytes > CACHE_BYTES:
            del self._encode
            release_freed_memory()
            self._encode = self._load()
            self._least_bytes = 0
        return ids

    def _load(self) -> Callable[[str], np.ndarray]:
        return gigatoken.Tokenizer.from_json(self._json).backend.encode


class ReferenceEncoder:
    """HF `tokenizers`: the referee, and the encoder where the fast one may differ."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = open_tokenizer(path)

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]


@functools.lru_cache(maxsize=1)
def open_fast_encoder(path: Path) -> FastEncoder | str:
    """Return the fast encoder of a tokenizer.json, or what it is not known to do alike."""
    config = orjson.loads(path.read_bytes())
    reason = (
        _model_reason(config["model"])
        or _splitter_reason(config)
        or _added_tokens_reason(config["added_tokens"])
    )
    if reason:
        return reason
    try:
        return FastEncoder(config)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return f"gigatoken does not load it: {error}"


@functools.lru_cache(maxsize=1)
def open_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, which neither cuts nor pads nor sees control."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # what tokenizers raises for any bad file
        raise PipelineError(f"{path} is not a tokenizer ({error}); train or copy one") from None
    tokenizer.encode_special_tokens = True  # `<|endoftext|>` inside a source file is not an end
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_tokenizer_record(path: Path) -> TokenizerRecord:
    """Return the fingerprint, size and end-of-text id of a tokenizer.json."""
    if not path.is_file():
        raise PipelineError(f"{path} does not exist; give tokenizer=FOLDER with a tokenizer.json")
    tokenizer = open_tokenizer(path)
    eos_token_id = tokenizer.token_to_id(EOS)
    if eos_token_id is None:
        raise PipelineError(f"{path} has no {EOS}; train one with data_pipeline.train_tokenizer")
    return TokenizerRecord(file_sha256(path), tokenizer.get_vocab_size(), eos_token_id)


def _model_reason(model: dict[str, Any]) -> str | None:
    if model.get("type") != "BPE":
        return f"model.type {model.get('type')}"
    for key, allowed in PLAIN_BPE.items():
        if model.get(key) not in allowed:
            return f"model.{key} {model[key]}"
    missing = [symbol for symbol in ByteLevel.alphabet() if symbol not in model["vocab"]]
    return f"{len(missing)} bytes without an id" if missing else None


def _splitter_reason(config: dict[str, Any]) -> str | None:
    """Return what differs from: a regular expression isolates words, then bytes are spelled."""
    if config.get("normalizer") is not None:
        return f"normalizer {config['normalizer'].get('type')}"
    splitter = config.get("pre_tokenizer") or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return f"pre_tokenizer {last.get('type')}"
    if len(splits) != (0 if last.get("use_regex", True) else 1):
        return "pre_tokenizer splits not exactly once"
    for split in splits:
        isolates = split.get("behavior") == "Isolated" and not split.get("invert")
        if split.get("type") != "Split" or not isolates or "Regex" not in split["pattern"]:
            return f"pre_tokenizer {split.get('type')}"
    return None


def _added_tokens_reason(added: list[dict[str, Any]]) -> str | None:
    texts = [token for token in added if not token["special"]]
    for token in texts:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            return f"added token {token['content']!r} takes its surroundings"
    for token, special in itertools.product(texts, (t for t in added if t["special"])):
        if _overlap(token["content"], special["content"]):
            return f"added tokens {token['content']!r} and {special['content']!r} overlap"
    return None


def _overlap(one: str, other: str) -> bool:
    """Return whether the two can share characters of a text."""
    if one in other or other in one:
        return True
    shortest = min(len(one), len(other))
    return any(one.endswith(other[:n]) or other.endswith(one[:n]) for n in range(1, shortest))
