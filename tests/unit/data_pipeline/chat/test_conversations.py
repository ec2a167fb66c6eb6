"""What is no conversation, or not rendered as it must be: one message each, with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from data_pipeline.chat.options import ChatFault, ChatOptions
from data_pipeline.config import PipelineError
from data_pipeline.special_tokens import CHAT_TEMPLATE
from tests.repo.files import ROOT
from tests.unit.data_pipeline.chat.shapes import encoder_of, messages_of, run, write_lines

GOOD = {"messages": messages_of("hi", "ho")}


def with_message(**message: Any) -> dict[str, Any]:
    return {"messages": [message, *GOOD["messages"]]}


CALL = {"name": "unheard_of", "arguments": {}}
BAD = {
    "invalid_json": ('{"messages": [', r"is not JSON \(.*\)"),
    "not_an_object": ([1], "is a list, not an object"),
    "no_messages": ({"text": "a"}, "has 'messages': None, not a list of messages"),
    "no_assistant": ({"messages": GOOD["messages"][:1]}, "has no assistant turn"),
    "no_answer": (
        {"messages": [*GOOD["messages"], {"role": "user", "content": "and?"}]},
        "ends with a turn of user, not of the assistant",
    ),
    "unknown_role": (
        with_message(role="human", content="x"),
        "has message 1 of role 'human'; choose from system, developer, user",
    ),
    "empty_content": (
        {"messages": [*GOOD["messages"], {"role": "user", "content": " \n"}]},
        r"has message 3 \(user\) with empty content",
    ),
    "special_token": (
        {"messages": messages_of("hi", "a<|role_end|>b")},
        r"has the special token '<\|role_end\|>' in the text of message 2",
    ),
    "nul": ({"messages": messages_of("hi", "a\0b")}, "has a NUL character in message 2"),
    "bad_message": (
        with_message(role="user", content=["x"]),
        r"has message 1 with content \['x'\], not a string",
    ),
    "bad_tools": ({**GOOD, "tools": "add"}, "has 'tools': 'add', not a list of objects"),
    "bad_template_kwargs": ({**GOOD, "chat_template_kwargs": 1}, "'chat_template_kwargs': 1, not"),
    "template": (
        with_message(role="tool", content="4"),
        "the chat template says 'role tool is not known; use system, user, assistant'",
    ),
    "content_lost": (
        {"messages": [GOOD["messages"][0], {"role": "assistant", "tool_calls": [CALL]}]},
        r"message 2 \(assistant\), of which the template leaves out or changes 'unheard_of'",
    ),
    "long": ({"messages": messages_of("hi", "ho " * 200)}, "tokens long, more than max_tokens=100"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_record_is_named_and_can_be_counted(
    folders: dict[str, Path], tmp_path: Path, reason: str
) -> None:
    record, message = BAD[reason]
    source = tmp_path / "bad.jsonl"
    write_lines(source, [GOOD, GOOD, record, GOOD])
    with pytest.raises(PipelineError, match=rf"bad\.jsonl:3 .*{message}.*\[{reason}\]; repair it"):
        run(source, folders["demo"], tmp_path / "shard", max_tokens=100)
    assert not (tmp_path / "shard.idx").exists()
    manifest = run(source, folders["demo"], tmp_path / "shard", max_tokens=100, on_error="skip")
    assert manifest["skipped"] == {reason: 1}
    assert manifest["documents"] == manifest["chat"]["trained_turns"] == 3


@pytest.mark.parametrize(
    ("message", "detail"),
    [
        ("text", "has message 1, a str, not an object"),
        (
            {"role": "user", "content": "a", "weight": 0},
            "with key 'weight'; known are role, content",
        ),
        (
            {"role": "assistant", "content": "a", "tool_calls": "f"},
            "with tool_calls 'f', not a list",
        ),
        ({"role": "assistant", "content": "a", "reasoning_content": 1}, "reasoning_content 1, not"),
    ],
)
def test_a_bad_message_is_named(folders: dict[str, Path], message: Any, detail: str) -> None:
    record = {"messages": [message, *GOOD["messages"]]}
    with pytest.raises(ChatFault, match=detail):
        encoder_of(folders["demo"]).encode(record)


def test_long_samples_are_dropped_with_a_count(folders: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "x.jsonl"
    write_lines(source, [GOOD, {"messages": messages_of("hi", "ho " * 200)}, GOOD])
    arguments = {"max_tokens": 100, "on_long": "drop"}
    manifest = run(source, folders["demo"], tmp_path / "shard", **arguments)
    assert manifest["skipped"] == {"dropped_long": 1}
    assert manifest["chat"]["conversations"] == 3
    assert manifest["documents"] == manifest["chat"]["trained_turns"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "sft"}, "format=sft is unknown; choose text or chat"),
        ({"format": "text", "max_tokens": 5}, "max_tokens=5 says how conversations are read, but"),
        ({"on_rewrite": "keep"}, "on_rewrite=keep is unknown; choose refuse or split"),
        ({"on_long": "cut"}, "on_long=cut is unknown; choose refuse or drop"),
        ({"max_tokens": -1}, "max_tokens=-1 is below 0"),
        ({"template_arguments": "[]"}, r"template_arguments=\[\] is not a JSON object \(a list\)"),
        ({"template_arguments": "{"}, r"template_arguments={ is not a JSON object"),
    ],
)
def test_wrong_arguments_are_refused(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_lines(tmp_path / "x.jsonl", [GOOD])
    with pytest.raises(PipelineError, match=message):
        run(tmp_path / "x.jsonl", folders["demo"], tmp_path / "out" / "shard", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"has no chat template \(none\); give a folder with chat_template.jinja"),
        ([{"name": "rag", "template": "x"}], r"has no chat template \(only rag\)"),
        ("{%- for", "line 1 of its chat template is no Jinja"),
    ],
)
def test_a_template_that_is_missing_or_none_is_refused(
    folders: dict[str, Path], tmp_path: Path, template: Any, message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        encoder_of(folder_with(folders["demo"], tmp_path, template))


def folder_with(base: Path, folder: Path, template: Any) -> Path:
    """Return a folder with the tokenizer of another and a template in its configuration."""
    (folder / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_template_file_goes_before_the_configuration(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folder_with(folders["demo"], tmp_path, "{{ raise_exception('not this') }}")
    config = json.loads((folders["demo"] / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(config["chat_template"])
    ids = [encoder_of(f).encode(GOOD)[0].ids for f in (folder, folders["demo"])]
    assert ids[0] == ids[1]


def test_a_template_that_asks_for_the_date_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folder_with(folders["demo"], tmp_path, "{{ strftime_now('%Y') }}")
    with pytest.raises(ChatFault, match=r"strftime_now\('%Y'\) would make the text depend on"):
        encoder_of(folder).encode(GOOD)


def test_a_turn_without_an_end_token_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ':' + m.content + '\\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    folder = folder_with(folders["demo"], tmp_path, template)
    with pytest.raises(ChatFault, match="message 2, which the template ends with no special token"):
        encoder_of(folder).encode(GOOD)


def test_nulls_of_parquet_are_absent_keys(folders: dict[str, Path]) -> None:
    padded = [{**m, "tool_calls": None, "name": None} for m in GOOD["messages"]]
    record = {"messages": padded, "tools": None, "chat_template_kwargs": {"enable_thinking": None}}
    encoder = encoder_of(folders["demo"])
    assert encoder.encode(record)[0].ids == encoder.encode(GOOD)[0].ids


def test_options_know_their_words() -> None:
    with pytest.raises(PipelineError, match="on_rewrite=no is unknown"):
        ChatOptions(on_rewrite="no")


SIMPLE = "{% for m in messages %}{{ m.role + ':' + m.content + '<|sep|>' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"


def text_of(folder: Path, record: dict[str, Any]) -> str:
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    return tokenizer.decode(encoder_of(folder).encode(record)[0].ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("further", "role"), [("{# 'observation' #}", "observation"), ("", "tool")]
)
def test_an_observation_is_what_the_template_calls_it(
    folders: dict[str, Path], tmp_path: Path, further: str, role: str
) -> None:
    folder = folder_with(folders["demo"], tmp_path, further + SIMPLE + PROMPT)
    record = with_message(role="observation", content="4")
    assert text_of(folder, record).startswith(f"{role}:4<|sep|>user:hi")


def test_conversations_with_tools_have_a_template_of_their_own(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with_tools = "{{ tools | tojson }}" + SIMPLE + PROMPT
    templates = {"default": SIMPLE + PROMPT, "tool_use": with_tools}
    named = [{"name": name, "template": text} for name, text in templates.items()]
    folder = folder_with(folders["demo"], tmp_path, named)
    tools = [{"function": {"name": "add"}}]
    assert text_of(folder, {**GOOD, "tools": tools}).startswith(json.dumps(tools) + "user:hi")
    assert text_of(folder, GOOD).startswith("user:hi")


def test_a_tool_that_the_template_leaves_out_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ChatFault, match="has tool 'add', which the template leaves out"):
        encoder_of(folders["demo"]).encode({**GOOD, "tools": [{"function": {"name": "add"}}]})


def test_a_tokenizer_that_begins_each_text_with_a_blank_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folder_with(folders["demo"], tmp_path, SIMPLE + PROMPT)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    tokenizer.save(f"{folder}/tokenizer.json")
    with pytest.raises(PipelineError, match="format=chat encodes turns apart: give a tokenizer"):
        encoder_of(folder)


def test_exports_ship_the_template_of_the_training_data() -> None:
    """What a tokenizer of ours was trained with is what a folder without a template gets."""
    shipped = ROOT / "ring_train/hf/modeling/chat_template.jinja"
    assert shipped.read_text() == CHAT_TEMPLATE + "\n"
