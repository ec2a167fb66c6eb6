"""Templates that rewrite earlier turns, or leave something out, are never obeyed silently."""

from pathlib import Path

import pytest

from data_pipeline.chat.options import ChatFault
from tests.unit.data_pipeline.chat.shapes import encoder_of, messages_of

THOUGHTS = {
    "messages": messages_of("1", "<think>\na\n</think>\n\nb", "2", "<think>\nc\n</think>\n\nd")
}


@pytest.mark.parametrize("shape", ["demo", "ours", "stripped"])
def test_a_rewritten_turn_is_refused_with_the_first_difference(
    folders: dict[str, Path], shape: str
) -> None:
    pattern = r"message 2, which the chat template rewrites .*<think>.* on_rewrite=split makes"
    with pytest.raises(ChatFault, match=pattern) as caught:
        encoder_of(folders[shape]).encode(THOUGHTS)
    assert caught.value.reason == "rewritten"


def test_a_split_conversation_is_one_sample_a_turn(folders: dict[str, Path]) -> None:
    samples = encoder_of(folders["stripped"], on_rewrite="split").encode(THOUGHTS)
    assert [sample.turn for sample in samples] == [2, 4]
    assert [sample.num_turns for sample in samples] == [1, 1]


def test_a_conversation_that_is_not_rewritten_is_not_split(folders: dict[str, Path]) -> None:
    record = {"messages": messages_of("1", "b", "2", "<think>\nc\n</think>\n\nd")}
    samples = encoder_of(folders["stripped"], on_rewrite="split").encode(record)
    assert [(sample.turn, sample.num_turns) for sample in samples] == [(None, 2)]


@pytest.mark.parametrize("on_rewrite", ["refuse", "split"])
def test_reasoning_that_even_the_last_turn_loses_is_refused(
    folders: dict[str, Path], on_rewrite: str
) -> None:
    pattern = r"message 2 \(assistant\), of which the template leaves out or changes 'a'"
    with pytest.raises(ChatFault, match=pattern):
        encoder_of(folders["forgetful"], on_rewrite=on_rewrite).encode(THOUGHTS)


def test_a_newline_that_joins_the_header_is_refused_or_split(folders: dict[str, Path]) -> None:
    """The server joins the newlines of header and earlier answer to one id; a model cannot."""
    record = {"messages": messages_of("1", "\nx", "2", "y")}
    pattern = "message 4, whose prompt has other ids in one go .* from id"
    with pytest.raises(ChatFault, match=pattern) as caught:
        encoder_of(folders["chatml"]).encode(record)
    assert caught.value.reason == "other_prompt_ids"
    samples = encoder_of(folders["chatml"], on_rewrite="split").encode(record)
    assert [sample.turn for sample in samples] == [2, 4]
