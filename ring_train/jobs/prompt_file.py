"""Files of prompts in token ids."""

import json
from pathlib import Path
from typing import Any

from ring_train.errors import UserError


def read_prompts(path: Path, vocab_size: int) -> list[list[int]]:
    """Return the prompts of a file {"prompts": [[ids]]}, all ids below `vocab_size`.

    Raises:
        UserError: not such a file.
    """
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))["prompts"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"prompts={path}: {type(error).__name__}: {error}; "
            'give a JSON file {"prompts": [[ids]]}'
        ) from error
    if not isinstance(prompts, list) or not prompts:
        raise UserError(
            f"prompts={path}: {_begin(prompts)} is no list of prompts, or an empty one; give at "
            'least one, {"prompts": [[ids]]}'
        )
    for prompt in prompts:
        _check_prompt(path, prompt, vocab_size)
    return prompts


def _check_prompt(path: Path, prompt: Any, vocab_size: int) -> None:
    # A bool is an int to Python, and no token id.
    is_list = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    if not is_list or len(prompt) < 2:
        raise UserError(
            f"prompts={path}: {_begin(prompt)} is no list of at least two token ids; "
            "nothing could be predicted from it"
        )
    outside = [token for token in prompt if not 0 <= token < vocab_size]
    if outside:
        raise UserError(
            f"prompts={path}: token id {outside[0]} is outside vocab_size={vocab_size} of the "
            "model; tokenise with its tokenizer"
        )


def _begin(value: Any) -> str:
    """Return the beginning of a value as a person wrote it."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


MAX_SHOWN = 60
"""Characters."""
