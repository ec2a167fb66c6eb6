"""How tokens are chosen, and the checks of what a caller asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ring_train.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is written: which token comes next, and when it ends."""

    max_new_tokens: int
    """The longest answer, tokens."""
    stop_tokens: tuple[int, ...]
    """Ids after which an answer ends; may be empty."""
    temperature: float = 1.0
    """0 = the likeliest token."""
    top_p: float = 1.0
    """Only the fewest likeliest tokens that reach this probability; 1 = no cut."""
    top_k: int | None = None
    """Only so many likeliest tokens; None = no cut."""
    seed: int = 1234
    """0 to 2**63 - 1; with the same seed, prompts and weights, the same answers."""


def check_request(
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    num_samples: int,
    *,
    vocab_size: int,
    context: int,
) -> None:
    """Raise for what cannot be generated; the first problem that is found.

    Args:
        prompts: token ids.
        sampling: how tokens are chosen.
        num_samples: answers to each prompt.
        vocab_size: rows of the embedding.
        context: tokens of the longest sequence.

    Raises:
        UserError: a value is out of range, or a prompt is empty, too long or of another tokenizer.
    """
    problems = _sampling_problems(sampling, num_samples, vocab_size)
    for index, prompt in enumerate(prompts):
        if problems:
            break
        if not len(prompt):
            problems.append(f"prompt {index} is empty; give each at least one token")
        elif min(prompt) < 0 or max(prompt) >= vocab_size:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            problems.append(
                f"prompt {index} has token {wrong}, which is outside vocab_size={vocab_size}; "
                "tokenise with the tokenizer of this model"
            )
        elif len(prompt) >= context:
            problems.append(
                f"prompt {index} has {len(prompt)} tokens, which leaves no room for an answer in "
                f"the model's context of {context}; shorten it to {context - 1} or less"
            )
    if problems:
        raise UserError(problems[0])


def _sampling_problems(sampling: Sampling, num_samples: int, vocab_size: int) -> list[str]:
    top_k = sampling.top_k
    stop = sampling.stop_tokens
    rules = {
        f"max_new_tokens={sampling.max_new_tokens} is less than the one token that an answer "
        "needs; set 1 or more": sampling.max_new_tokens < 1,
        f"temperature={sampling.temperature} is negative; set 0 for the likeliest token, or "
        "more": sampling.temperature < 0,
        f"temperature={sampling.temperature} is not finite; set 0 for the likeliest token, 1 for "
        "the model's own distribution, or another number": not math.isfinite(sampling.temperature),
        f"top_p={sampling.top_p} is no probability above 0; set it above 0 and at most 1": not 0
        < sampling.top_p
        <= 1,
        f"top_k={top_k} keeps no token; set 1 or more, or None for no cut": top_k is not None
        and top_k < 1,
        f"seed={sampling.seed} is outside 0 <= seed < 2**63; choose one in that range": not 0
        <= sampling.seed
        < 2**63,
        f"num_samples={num_samples} asks for no answer; set 1 or more": num_samples < 1,
        f"stop_tokens={stop} are not all below vocab_size={vocab_size}; take the ids from the "
        "tokenizer of this model": any(not 0 <= token < vocab_size for token in stop),
    }
    return [text for text, is_wrong in rules.items() if is_wrong]
