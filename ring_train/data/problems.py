"""Files of problems with expected answers: one JSON object a line.

Its keys are `answer`, either `problem` (a string) or `messages` ({role, content}), perhaps `id`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_train.data.errors import DataError

KEYS = {"id", "problem", "messages", "answer"}
MESSAGE_KEYS = {"role", "content"}
MAX_PROBLEMS_SHOWN = 5
"""Bad lines named in an error; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is asked, and the answer that is right."""

    domain: str
    id: str
    """Its own, else its line number."""
    place: str
    """FILE:LINE."""
    messages: tuple[dict[str, str], ...]
    """The last is the user's; a `problem` is one user message."""
    is_text: bool
    """Given as `problem`, so that it can do without a chat."""
    answer: str


def read_problems(domain: str, path: Path, limit: int | None) -> list[Problem]:
    """Return the problems of a file, at most the first `limit`.

    Raises:
        DataError: naming file and line of each bad one or repeated id, or that there is none.
    """
    problems, faults = [], []
    for number, line in enumerate(itertools.islice(_lines(path), limit), start=1):
        try:
            problems.append(_problem(domain, f"{path}:{number}", str(number), line))
        except DataError as error:
            faults.append(str(error))
    raise_faults(faults + _repeated(problems))
    if not problems:
        raise DataError(f"evaluation.problems.{domain}={path} is empty; give at least one problem")
    return problems


def raise_faults(faults: list[str]) -> None:
    """Raise a DataError with the first faults, one a line, if there are any."""
    if faults:
        more = len(faults) - MAX_PROBLEMS_SHOWN
        shown = faults[:MAX_PROBLEMS_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        raise DataError("\n".join(shown))


def _repeated(problems: list[Problem]) -> list[str]:
    """Return which ids are given twice, and where."""
    places: dict[str, str] = {}
    faults = []
    for problem in problems:
        first = places.setdefault(problem.id, problem.place)
        if first != problem.place:
            faults.append(
                f"{problem.place}: id={problem.id!r} is that of {first} (without an id it is the "
                "line number); give each problem its own"
            )
    return faults


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as stream:
            yield from stream
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); give a JSONL file of problems") from None


def _problem(domain: str, place: str, number: str, line: str) -> Problem:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON ({error}); write one object a line") from None
    if not isinstance(record, dict):
        raise DataError(f"{place} is {type(record).__name__}, not an object; write one a line")
    unknown = sorted(record.keys() - KEYS)
    if unknown:
        raise DataError(f"{place} has the unknown key {unknown[0]}; use {', '.join(sorted(KEYS))}")
    answer, name = record.get("answer"), record.get("id", number)
    if not isinstance(answer, str) or not answer.strip():
        raise DataError(f"{place} has no answer ({answer!r}); give the expected one as a string")
    if not isinstance(name, str) or not name:
        raise DataError(f"{place}: id={name!r} is not a name; give a string or leave it out")
    if ("problem" in record) == ("messages" in record):
        raise DataError(f"{place} must have either problem or messages; keep one of them")
    return Problem(
        domain=domain,
        id=name,
        place=place,
        messages=_messages(place, record),
        is_text="problem" in record,
        answer=answer,
    )


def _messages(place: str, record: dict[str, Any]) -> tuple[dict[str, str], ...]:
    """Return the messages of a record, checked as far as no template is needed."""
    if "problem" in record:
        text = record["problem"]
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{place}: problem={text!r} is empty; write what is asked")
        return ({"role": "user", "content": text},)
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: messages is no list of messages; give at least one of the user")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() != MESSAGE_KEYS:
            raise DataError(f"{place}: message {number} is not {{role, content}}; give these two")
        for key, text in message.items():
            if not isinstance(text, str) or not text.strip():
                raise DataError(f"{place}: message {number} has {key}={text!r}; write some text")
    if messages[-1]["role"] != "user":
        raise DataError(
            f"{place}: the last message is of {messages[-1]['role']!r}, and there is nothing to "
            "answer; end with a message of the user"
        )
    return tuple(messages)
