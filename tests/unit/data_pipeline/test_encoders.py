"""The fast encoder makes the ids of HF `tokenizers`; where it might not, it is not used."""

import ctypes
import gc
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import PipelineError
from data_pipeline.tokenization.encoders import (
    FastEncoder,
    ReferenceEncoder,
    open_fast_encoder,
    read_tokenizer_record,
)
from data_pipeline.tokenization.memory import resident_bytes
from data_pipeline.train_tokenizer import TrainTokenizer, train_tokenizer

LARGE = Path(__file__).parents[4] / "shared" / "tokenizer" / "bpe151k" / "tokenizer.json"
"""A vocabulary of 151,646 beside the checkout, if it is there."""

ADVERSARIAL = (
    *("", " ", "\n", "\r", "\0", "\t \t", "a", " a", "a ", "\ufeff", "\u2028\u2029\x85"),
    *("lone \r CR", "\r\n\r\n", "a\n \n  \n", "   \n", " " * 999, "\n" * 999, "\t" * 99 + "x"),
    *("a\0b\0\0", "\x00\x01\x7f", "x" * 20_000, "ab" * 9_999, "9" * 500, "1a2b3c", "-" * 300),
    *("<|endoftext|>", "a<|endoftext|>b<|startoftext|><|role_end|>", "<role>HUMAN</role>"),
    *("<think>x</think>", "<thi<think>nk>", "<|endof<think>text|>", "<tool_call><|im_start|>"),
    *("don't I'LL we've 'S '\u017f \u017f", "O'Neil''s", "\u0130I\u0131i", "\u00df\u1e9e"),
    *("e\u0301 \u00e9 \u1100\u1161 \uac00", "\u0928\u093f \u0e01\u0e33", "\u202eabc\u202c"),
    *("\u4e2d\u6587\uff0c\u3002 \u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8", "\u3000\u00a0\u2009x"),
    *("\U0001f469\u200d\U0001f680\U0001f1e9\U0001f1ea", "\ufffd\ufffe\U0010ffff", "\u0600\u06dd1"),
    *("\u0661\u0662\u00bd\u2167\u00b2", "_x __y__ $z #w", "\\n\\t", "//---***", "\x1c\x1d\x1e\x1f"),
)


def trained(folder: Path) -> Path:
    """Train on this file's neighbours: Python with some Unicode."""
    text = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")))
    text += "\u00e9t\u00e9 \u4e2d\u6587\u5b57\u7b26 \u65e5\u672c\u8a9e " * 50
    record = {"id": "a", "text": text, "domain": "d"}
    (folder / "x.jsonl").write_text(json.dumps(record) + "\n")
    arguments = {"input": f"{folder}/x.jsonl", "output": str(folder)}
    train_tokenizer(TrainTokenizer(vocab_size=600, sample_bytes=10**9, **arguments))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=["trained", "151k"])
def encoders(request: pytest.FixtureRequest, small: Path) -> tuple[FastEncoder, ReferenceEncoder]:
    if request.param == "151k" and not LARGE.exists():
        pytest.skip(f"{LARGE.name} of 151k entries is not beside this checkout")
    path = small if request.param == "trained" else LARGE
    return fast_encoder(path), ReferenceEncoder(path)


def fast_encoder(path: Path) -> FastEncoder:
    encoder = open_fast_encoder(path)
    assert isinstance(encoder, FastEncoder), encoder
    return encoder


def test_both_encoders_agree_on_adversarial_text(
    encoders: tuple[FastEncoder, ReferenceEncoder],
) -> None:
    fast, reference = encoders
    texts = [*ADVERSARIAL, "".join(ADVERSARIAL), " ".join(reversed(ADVERSARIAL))]
    for text, one, other in zip(texts, fast.encode(texts), reference.encode(texts), strict=True):
        assert one.tolist() == other.tolist(), repr(text[:60])


def test_both_encoders_agree_on_every_assigned_character(
    encoders: tuple[FastEncoder, ReferenceEncoder],
) -> None:
    fast, reference = encoders
    points = [*range(0xD800), *range(0xE000, 0x33480), *range(0xE0000, 0xE0200)]
    for joint in ("", " ", "a\u0301"):
        texts = [joint.join(map(chr, points[i : i + 5000])) for i in range(0, len(points), 5000)]
        found, expected = fast.encode(texts), reference.encode(texts)
        assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


PIECES = st.one_of(
    st.sampled_from(ADVERSARIAL[:-40] + ADVERSARIAL[20:]),
    st.text(max_size=20),
    st.text(alphabet=" \n\r\t'<|>aS1\u0301", max_size=20),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=8))
def test_both_encoders_agree_on_any_text(
    encoders: tuple[FastEncoder, ReferenceEncoder], pieces: list[str]
) -> None:
    fast, reference = encoders
    text = "".join(pieces)
    assert fast.encode([text])[0].tolist() == reference.encode([text])[0].tolist()


def test_the_fast_encoder_forgets_before_it_fills_the_memory(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what other tests have freed would hide growth
    fast, reference = fast_encoder(small), ReferenceEncoder(small)
    monkeypatch.setattr("data_pipeline.tokenization.encoders.CACHE_BYTES", 2**24)
    rng = random.Random(0)
    loads = []
    load = FastEncoder._load
    monkeypatch.setattr(FastEncoder, "_load", lambda self: loads.append(0) or load(self))
    peak_bytes = first_bytes = resident_bytes()
    for _ in range(60):
        letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=100_000))
        text = " ".join(letters[at : at + 10] for at in range(0, len(letters), 10))
        (ids,) = fast.encode([text])
        peak_bytes = max(peak_bytes, resident_bytes())
    assert ids.tolist() == reference.encode([text])[0].tolist()
    assert loads
    assert peak_bytes - first_bytes < 100 * 2**20


def test_control_tokens_in_text_stay_text_and_others_are_ids(small: Path) -> None:
    config = json.loads(small.read_text())
    ids = {token["content"]: token["id"] for token in config["added_tokens"]}
    text = "<|endoftext|><role><think><|role_end|></think>"
    for encoder in (fast_encoder(small), ReferenceEncoder(small)):
        found = set(encoder.encode([text])[0].tolist())
        assert {ids["<think>"], ids["</think>"]} <= found
        assert not found & {ids["<|endoftext|>"], ids["<role>"], ids["<|role_end|>"]}


def set_normalizer(config: dict[str, Any]) -> None:
    config["normalizer"] = {"type": "NFC"}


def set_ignore_merges(config: dict[str, Any]) -> None:
    config["model"]["ignore_merges"] = True


def set_regex(config: dict[str, Any]) -> None:
    config["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{L}+x|[^z]"


def set_prefix_space(config: dict[str, Any]) -> None:
    config["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def strip_think(config: dict[str, Any]) -> None:
    next(t for t in config["added_tokens"] if t["content"] == "<think>")["lstrip"] = True


def overlap_tokens(config: dict[str, Any]) -> None:
    next(t for t in config["added_tokens"] if t["content"] == "<think>")["content"] = "|>x"


def drop_a_byte(config: dict[str, Any]) -> None:
    config["model"]["vocab"]["\u0120\u0120"] = config["model"]["vocab"].pop("\u0100")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_normalizer, "normalizer NFC"),  # gigatoken 0.10 composes some characters otherwise
        (set_ignore_merges, "model.ignore_merges True"),
        (set_regex, "gigatoken does not load it"),
        (set_prefix_space, "pre_tokenizer ByteLevel"),
        (strip_think, "takes its surroundings"),
        (overlap_tokens, "overlap"),
        (drop_a_byte, "1 bytes without an id"),
    ],
)
def test_what_the_fast_encoder_might_do_otherwise_is_named(
    small: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    config = json.loads(small.read_text())
    change(config)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(config))
    found = open_fast_encoder(path)
    assert isinstance(found, str)
    assert reason in found


def test_truncation_in_the_tokenizer_cuts_no_document(small: Path, tmp_path: Path) -> None:
    config = json.loads(small.read_text())
    config["truncation"] = {
        **{"direction": "Right", "max_length": 4},
        **{"strategy": "LongestFirst", "stride": 0},
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(config))
    assert len(ReferenceEncoder(path).encode(["quick brown " * 9])[0]) > 4


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PipelineError, match="is not a tokenizer"):
        read_tokenizer_record(tmp_path / "tokenizer.json")
