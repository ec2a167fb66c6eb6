"""Where the assistant speaks: the text before each of its turns, and the text it must write.

A turn is cut from two renderings: of the messages before it with the generation prompt, which is
what an inference server sends, and of the messages up to it. Both must begin the rendering of the
whole conversation; where they do not, the template rewrites earlier turns.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from data_pipeline.chat.options import ChatFault
from data_pipeline.chat.template import ChatTemplate, Conversation

THINK_TAG = re.compile(r"</?think>")
EXCERPT_CHARACTERS = 40


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One turn of the assistant."""

    number: int
    """Of its message, from 1."""
    prompt: str
    """What an inference server sends."""
    answer: str
    """What follows the prompt, up to and with the turn's last special token."""
    rewrite: str | None
    """How the whole conversation reads otherwise; None where it begins with prompt and answer."""


def cut_turns(
    conversation: Conversation, template: ChatTemplate, special: re.Pattern[str]
) -> tuple[str, list[Turn]]:
    """Return the text of the whole conversation, and the turns of the assistant in it.

    Raises:
        ChatFault: the template raises, leaves out content, does not begin a turn with its
            generation prompt, or does not end it with a special token.
    """
    messages = conversation.messages
    text = template.render(conversation, len(messages), add_generation_prompt=False)
    turns = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            turns.append(_cut_turn(conversation, index, text, template, special))
        elif message["content"].strip() not in text:
            raise _lost(index, message, message["content"].strip())
    for tool in conversation.tools or []:
        if (name := _function_name(tool)) not in text:
            raise ChatFault("content_lost", f"has tool {name!r}, which the template leaves out")
    return text, turns


def _cut_turn(
    conversation: Conversation,
    index: int,
    text: str,
    template: ChatTemplate,
    special: re.Pattern[str],
) -> Turn:
    prompt = template.render(conversation, index, add_generation_prompt=True)
    up_to = template.render(conversation, index + 1, add_generation_prompt=False)
    if not up_to.startswith(prompt):
        raise ChatFault(
            "generation_prompt",
            f"has message {index + 1}, which the template does not begin with its generation "
            f"prompt: {_difference(prompt, up_to)}",
        )
    ends = [match.end() for match in special.finditer(up_to, len(prompt))]
    if not ends:
        detail = f"has message {index + 1}, which the template ends with no special token"
        raise ChatFault("no_end_token", detail)
    answer = up_to[len(prompt) : ends[-1]]
    message = conversation.messages[index]
    for piece in _pieces(message):
        if piece not in answer:
            raise _lost(index, message, piece)
    cut = up_to[: ends[-1]]
    rewrite = None if text.startswith(cut) else _difference(cut, text)
    return Turn(index + 1, prompt, answer, rewrite)


def _pieces(message: dict[str, Any]) -> Iterator[str]:
    """Yield what the rendering of an answer must contain; the template may set its own blanks."""
    for key in ("content", "reasoning_content"):
        yield from (piece.strip() for piece in THINK_TAG.split(message.get(key, "")))
    yield from (_function_name(call) for call in message.get("tool_calls", []))


def _function_name(entry: dict[str, Any]) -> str:
    """Return the name of a tool or of a call to one, which may lie below `function`."""
    inner = entry.get("function", entry)
    return str(inner.get("name", "")) if isinstance(inner, dict) else ""


def _lost(index: int, message: dict[str, Any], piece: str) -> ChatFault:
    return ChatFault(
        "content_lost",
        f"has message {index + 1} ({message['role']}), of which the template leaves out or changes "
        f"{piece[:EXCERPT_CHARACTERS]!r}",
    )


def _difference(alone: str, whole: str) -> str:
    """Return where two texts part."""
    pairs = enumerate(zip(alone, whole, strict=False))
    at = next((n for n, (one, other) in pairs if one != other), min(len(alone), len(whole)))
    first, second = (repr(part[at : at + EXCERPT_CHARACTERS]) for part in (alone, whole))
    return f"from character {at} on it is {first} in one rendering and {second} in the other"
