"""Conversations that a folder's chat template must render as training did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ring_train.hf.family import MODELING_DIR
from ring_train.hf.training_turns import TrainingTurn

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CHAT_TEMPLATE = "chat_template.jinja"

_TOOL = {"name": "clock", "description": "The time.", "parameters": {"type": "object"}}
_CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}

CONVERSATIONS: tuple[dict[str, Any], ...] = (
    {
        "messages": [
            {"role": "user", "content": "Compute 66 + 24."},
            {"role": "assistant", "content": "90"},
        ],
        "arguments": {},
    },
    {
        "messages": [
            {"role": "system", "content": "Answer in one word.\nAlways."},
            {"role": "user", "content": "Capital of Peru?"},
            {"role": "assistant", "content": "Lima"},
            {"role": "user", "content": "  and of\n\nChile?  "},
            {"role": "assistant", "content": "Santiago"},
        ],
        "arguments": {},
    },
    {
        "messages": [
            {"role": "user", "content": "Is 91 prime?"},
            {"role": "assistant", "reasoning_content": "91 = 7 * 13", "content": "No."},
        ],
        "arguments": {"enable_thinking": True},
    },
    {
        "messages": [
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "content": '{"time": "12:05"}'},
            {"role": "assistant", "content": "Five past twelve."},
        ],
        "arguments": {"tools": [{"type": "function", "function": _TOOL}]},
    },
)
"""Each ends with an answer; `arguments` are those of apply_chat_template."""


def compare_conversations(
    rendered: Sequence[Mapping[str, Any]], trained: Sequence[TrainingTurn]
) -> tuple[list[str], dict[str, Any]]:
    """Return in which conversations a server's prompt or answer is not what training saw.

    Args:
        rendered: what the folder makes of CONVERSATIONS, as `probe` returns it.
        trained: what the data pipeline makes of them.
    """
    differences = []
    for number, (found, wanted) in enumerate(zip(rendered, trained, strict=True), start=1):
        name = f"conversation {number}"
        if not found["text"].startswith(found["prompt"]):
            differences.append(f"{name}: the answer does not follow the generation prompt")
        for part in ("prompt_ids", "answer_ids"):
            one, other = found[part], getattr(wanted, part)
            if one != other:
                differences.append(f"{name}: {_first_difference(part, one, other)}")
    return differences, {"num_conversations": len(rendered)}


def _first_difference(part: str, found: list[int], wanted: list[int]) -> str:
    pairs = enumerate(zip(found, wanted, strict=False))
    at = next((i for i, (one, other) in pairs if one != other), min(len(found), len(wanted)))
    return (
        f"{part} have {len(found)} ids, {len(wanted)} in training, and differ from id {at} on: "
        f"{found[at : at + 4]}, {wanted[at : at + 4]} in training"
    )


def compare_tokenizer(folder: Path, trained: Path) -> tuple[list[str], dict[str, Any]]:
    """Return which tokenizer files of a folder are not those of training, byte for byte.

    Where training had no chat template the folder must have the one of this package.
    """
    differences = unreadable_tokenizer(folder)
    differences += [
        f"{name} is not that of the training data"
        for name in TOKENIZER_FILES
        if _content(folder / name) != _content(trained / name)
    ]
    template = trained / CHAT_TEMPLATE
    is_ours = not template.exists() and b'"chat_template"' not in _content(
        trained / TOKENIZER_FILES[1]
    )
    wanted = _content(MODELING_DIR / CHAT_TEMPLATE if is_ours else template)
    if _content(folder / CHAT_TEMPLATE) != wanted:
        differences.append(f"{CHAT_TEMPLATE} is not that of training")
    return differences, {"chat_template": "of ring_train" if is_ours else "of training"}


def unreadable_tokenizer(folder: Path) -> list[str]:
    """Return why nothing can be tokenised with a folder; nothing if it can."""
    path = folder / TOKENIZER_FILES[0]
    if not path.is_file():
        return [f"{path.name} is missing"]
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises no narrower class
        return [f"{path.name} is no tokenizer ({error})"]
    return []


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
