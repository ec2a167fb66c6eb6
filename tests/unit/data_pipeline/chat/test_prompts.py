"""Before every trained turn stand the ids that an inference server would send."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.chat.encoder import ChatEncoder, Sample
from data_pipeline.chat.options import ChatFault
from tests.unit.data_pipeline.chat.shapes import SHAPES, encoder_of, messages_of

NUM_EXAMPLES = 60
TEXT = st.text("ab 12\n<|>.\u00e9\u4e2d", min_size=1, max_size=12).filter(str.strip)
THOUGHT = st.builds("<think>\n{}\n</think>\n\n{}".format, TEXT, TEXT)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Return messages whose answers think, if one does."""
    num_turns = draw(st.integers(1, 4))
    answers = draw(st.sampled_from([TEXT, THOUGHT]))
    contents = [draw(part) for _ in range(num_turns) for part in (TEXT, answers)]
    return messages_of(*contents, system=draw(st.one_of(st.just(""), TEXT)))


class Server:
    """`transformers`, which knows nothing of ours."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def ids(self, messages: list[dict[str, Any]], prompt: bool, **arguments: Any) -> list[int]:
        return self._tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=prompt,
            tokenize=True,
            return_dict=False,
            **arguments,
        )

    def text(self, messages: list[dict[str, Any]], prompt: bool, **arguments: Any) -> str:
        return self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=False, **arguments
        )

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


@pytest.fixture(scope="module")
def servers(folders: dict[str, Path]) -> dict[str, Server]:
    return {name: Server(folder) for name, folder in folders.items()}


def trained_runs(sample: Sample) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff([0, *map(int, sample.trained), 0]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def check(
    encoder: ChatEncoder, server: Server, record: dict[str, Any], end: str, **arguments: Any
) -> list[Sample]:
    """Compare every turn of a record with what the server sends and would read."""
    messages = record["messages"]
    samples = encoder.encode(record)
    turns = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    runs = [(sample, *run) for sample in samples for run in trained_runs(sample)]
    assert len(runs) == len(turns) == sum(sample.num_turns for sample in samples)
    for index, (sample, start, stop) in zip(turns, runs, strict=True):
        assert sample.ids[:start] == server.ids(messages[:index], True, **arguments)
        prompt = server.text(messages[:index], True, **arguments)
        answer = server.text(messages[: index + 1], False, **arguments).removeprefix(prompt)
        answer = answer[: answer.rindex(end) + len(end)]
        read = server.decode(sample.ids[start:stop])
        assert read == answer + "<|endoftext|>" * (stop == len(sample.ids))
    assert all(server.decode(sample.ids).count("<|endoftext|>") == 1 for sample in samples)
    assert all(sample.trained[-1] for sample in samples)
    return samples


@pytest.mark.parametrize("shape", ["demo", "ours", "chatml", "llama", "stripped"])
@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(messages=conversations())
def test_each_turn_follows_the_prompt_of_inference(
    folders: dict[str, Path],
    servers: dict[str, Server],
    shape: str,
    messages: list[dict[str, Any]],
) -> None:
    encoder = encoder_of(folders[shape], on_rewrite="split")
    check(encoder, servers[shape], {"messages": messages}, SHAPES[shape][1])


@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(messages=conversations())
def test_a_prompt_that_opens_the_reasoning_is_no_part_of_the_answer(
    folders: dict[str, Path], servers: dict[str, Server], messages: list[dict[str, Any]]
) -> None:
    encoder = encoder_of(folders["opened"], on_rewrite="split")
    thinks = "<think>" in messages[-1]["content"]
    if not thinks:
        with pytest.raises(ChatFault, match="does not begin with its generation prompt: from"):
            encoder.encode({"messages": messages})
        return
    samples = check(encoder, servers["opened"], {"messages": messages}, "<|im_end|>")
    assert all("<think>" not in text for text in trained_texts(servers["opened"], samples))


def trained_texts(server: Server, samples: list[Sample]) -> list[str]:
    return [server.decode(s.ids[a:b]) for s in samples for a, b in trained_runs(s)]


@settings(max_examples=NUM_EXAMPLES, deadline=None)
@given(messages=conversations(), data=st.data())
def test_the_released_template_with_tools_and_reasoning(
    ling: Path, messages: list[dict[str, Any]], data: st.DataObject
) -> None:
    server = _ling_server(ling)
    if data.draw(st.booleans()):
        call = {"function": {"name": "add", "arguments": {"a": 1}}}
        result = {"role": data.draw(st.sampled_from(["tool", "observation"])), "content": "2"}
        answer = {"role": "assistant", "content": "two", "reasoning_content": "it says 2"}
        messages = [*messages, {"role": "user", "content": "1+1"}]
        messages += [{"role": "assistant", "tool_calls": [call]}, result, result, answer]
    record = {"messages": messages, "tools": [{"function": {"name": "add", "x": "<b>"}}]}
    served = [m | {"role": m["role"].replace("observation", "tool")} for m in messages]
    encoder = encoder_of(ling, on_rewrite="split")
    samples = check(
        encoder, server, record | {"messages": served}, "<|role_end|>", tools=record["tools"]
    )
    assert [s.ids for s in encoder.encode(record)] == [s.ids for s in samples]


_SERVERS: dict[Path, Server] = {}


def _ling_server(folder: Path) -> Server:
    if folder not in _SERVERS:
        _SERVERS[folder] = Server(folder)
    return _SERVERS[folder]


def test_variables_of_command_and_record_reach_the_template(
    folders: dict[str, Path], servers: dict[str, Server]
) -> None:
    messages = messages_of("hi", "<think>\na\n</think>\n\nb")
    for own, thinking in ((None, True), ({"enable_thinking": False}, False)):
        encoder = encoder_of(folders["ours"], template_arguments={"enable_thinking": True})
        record = {"messages": messages, "chat_template_kwargs": own}
        arguments = {"enable_thinking": thinking}
        samples = check(encoder, servers["ours"], record, "<|role_end|>", **arguments)
        text = servers["ours"].decode(samples[0].ids)
        assert f"detailed thinking {'on' if thinking else 'off'}" in text
