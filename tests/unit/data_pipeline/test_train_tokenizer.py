"""The tokenizer folder."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from data_pipeline.config import PipelineError
from data_pipeline.documents import Document, write_documents
from data_pipeline.special_tokens import CONTROL_TOKENS, TEXT_TOKENS
from data_pipeline.train_tokenizer import TrainTokenizer, train_tokenizer

VOCAB_SIZE = 380
TEXT = "def compute(value):\n    return value * 1234\n\nThe value is computed, isn't it? "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [f"{TEXT} variable_{'abcdefghij'[n % 10] * (n % 7)} number {n}" for n in range(200)]
    documents = [Document(str(n), text, "code") for n, text in enumerate(texts)]
    write_documents(folder / "corpus.jsonl", documents)
    train_tokenizer(
        TrainTokenizer(input=f"{folder}/*.jsonl", output=f"{folder}/out", vocab_size=VOCAB_SIZE)
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@pytest.mark.parametrize(
    "text", [TEXT, "\u00e9\u20ac\U0001f600 \t\n\n x", "  leading", "a\r\nb", "Don't 007", ""]
)
def test_text_survives_a_round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_digits_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("x 1234+56=78;")["input_ids"])
    digits = [token for token in tokens if any(map(str.isdigit, token))]
    assert digits == list("12345678")


def test_special_tokens_have_the_last_ids_in_the_order_of_the_family(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert len(tokenizer) == VOCAB_SIZE
    tokens = [*CONTROL_TOKENS, *TEXT_TOKENS]
    last_ids = list(range(VOCAB_SIZE - len(tokens), VOCAB_SIZE))
    assert tokenizer.convert_tokens_to_ids(tokens) == last_ids
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.bos_token == "<|startoftext|>"
    assert tokenizer.bos_token_id not in tokenizer("text")["input_ids"]


def test_control_tokens_are_skipped_in_decoding_and_thoughts_are_not(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = tokenizer("<role>HUMAN</role><think>a</think><|role_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "HUMAN<think>a</think>"


def test_the_chat_template_renders_the_family_layout(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "<think>\nold\n</think>\n\nYes."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "No.", "reasoning_content": "new"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|>"
        "<role>HUMAN</role>One?<|role_end|><role>ASSISTANT</role>Yes.<|role_end|>"
        "<role>HUMAN</role>Two?<|role_end|>"
        "<role>ASSISTANT</role>\n<think>\nnew\n</think>\n\nNo.<|role_end|>"
    )
    prompt = tokenizer.apply_chat_template(
        messages[1:2], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    assert prompt == (
        "<role>SYSTEM</role>detailed thinking on<|role_end|>"
        "<role>HUMAN</role>One?<|role_end|><role>ASSISTANT</role>"
    )


def test_the_chat_template_renders_calls_and_their_results(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "5"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    calls = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert f"<role>ASSISTANT</role>{calls}\n{calls}<|role_end|>" in text
    assert (
        "<role>OBSERVATION</role>\n<tool_response>\n2\n</tool_response>"
        "\n<tool_response>\n3\n</tool_response><|role_end|><role>ASSISTANT</role>5<|role_end|>"
    ) in text


def test_training_twice_gives_the_same_bytes(folder: Path) -> None:
    arguments = {"input": f"{folder}/*.jsonl", "vocab_size": VOCAB_SIZE}
    train_tokenizer(TrainTokenizer(output=f"{folder}/again", **arguments))
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in (folder / "again").iterdir()) == names
    for name in names:
        assert (folder / "again" / name).read_bytes() == (folder / "out" / name).read_bytes()


@pytest.mark.parametrize(
    ("vocab_size", "message"),
    [(200, "choose at least 267"), (100_000, "give more text or a smaller vocabulary")],
)
def test_a_vocabulary_that_cannot_be_is_refused(
    folder: Path, vocab_size: int, message: str
) -> None:
    arguments = {"input": f"{folder}/*.jsonl", "vocab_size": vocab_size}
    with pytest.raises(PipelineError, match=message):
        train_tokenizer(TrainTokenizer(output=f"{folder}/refused", **arguments))
    assert not (folder / "refused").exists()
