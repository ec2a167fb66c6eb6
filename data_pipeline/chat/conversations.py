"""Records to conversations: every turn is checked before anything is rendered."""

import re
from collections.abc import Iterator
from typing import Any

from data_pipeline.chat.options import ChatFault
from data_pipeline.chat.template import Conversation

ROLES = ("system", "developer", "user", "assistant", "tool", "observation")
MESSAGE_KEYS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")


def read_conversation(
    record: dict[str, Any], arguments: dict[str, Any], special: re.Pattern[str]
) -> Conversation:
    """Return the conversation of a record with `messages`.

    Args:
        record: also `tools` (list) and `chat_template_kwargs` (mapping), both optional.
        arguments: variables of the template; those of the record go before.
        special: matches every special token of the tokenizer.

    Raises:
        ChatFault: names the message.
    """
    messages = [_message(entry, n) for n, entry in enumerate(record["messages"], start=1)]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ChatFault("no_assistant", "has no assistant turn: there is nothing to learn from it")
    if roles[-1] != "assistant":
        detail = f"ends with a turn of {roles[-1]}, not of the assistant; cut what follows it"
        raise ChatFault("no_answer", detail)
    tools = record.get("tools")
    if tools is not None and not _is_list_of_objects(tools):
        raise ChatFault("bad_tools", f"has 'tools': {tools!r:.60}, not a list of objects")
    own = record.get("chat_template_kwargs")
    if own is not None and not isinstance(own, dict):
        detail = f"has 'chat_template_kwargs': {own!r:.60}, not an object"
        raise ChatFault("bad_template_kwargs", detail)
    own = {key: value for key, value in (own or {}).items() if value is not None}
    _refuse_special([*messages, tools, own], special)
    return Conversation(messages, tools or None, arguments | own)


def _message(entry: Any, number: int) -> dict[str, Any]:
    """Return a message without its nulls, which Parquet writes for absent keys."""
    if not isinstance(entry, dict):
        found = type(entry).__name__
        raise ChatFault("bad_message", f"has message {number}, a {found}, not an object")
    message = {key: value for key, value in entry.items() if value is not None}
    if unknown := [key for key in message if key not in MESSAGE_KEYS]:
        detail = (
            f"has message {number} with key {unknown[0]!r}; known are {', '.join(MESSAGE_KEYS)}"
        )
        raise ChatFault("bad_message", detail)
    role = message.get("role")
    if role not in ROLES:
        detail = f"has message {number} of role {role!r:.60}; choose from {', '.join(ROLES)}"
        raise ChatFault("unknown_role", detail)
    calls = message.get("tool_calls", [])
    if not _is_list_of_objects(calls):
        detail = f"has message {number} with tool_calls {calls!r:.60}, not a list of objects"
        raise ChatFault("bad_message", detail)
    for key in ("content", "reasoning_content"):
        if not isinstance(message.get(key, ""), str):
            detail = f"has message {number} with {key} {message[key]!r:.60}, not a string"
            raise ChatFault("bad_message", detail)
    if not message.get("content", "").strip() and not (role == "assistant" and calls):
        raise ChatFault("empty_content", f"has message {number} ({role}) with empty content")
    return {"content": "", **message}


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _refuse_special(parts: list[Any], special: re.Pattern[str]) -> None:
    for number, part in enumerate(parts, start=1):
        names = {len(parts) - 1: "tools", len(parts): "chat_template_kwargs"}
        place = names.get(number, f"message {number}")
        for text in _strings(part):
            if found := special.search(text):
                detail = f"has the special token {found[0]!r} in the text of {place}"
                raise ChatFault("special_token", detail)
            if "\0" in text:
                raise ChatFault("nul", f"has a NUL character in {place}")


def _strings(value: Any) -> Iterator[str]:
    """Yield every string below a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield str(key)
            yield from _strings(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _strings(entry)
