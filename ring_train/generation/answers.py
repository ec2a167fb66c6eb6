"""Answers: what was written of each sequence, and how ranks tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ring_train.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model wrote after one prompt, once."""

    prompt: int
    """Index into the prompts."""
    sample: int
    """0 to num_samples - 1."""
    tokens: list[int]
    """Generated ids, the stop token included."""
    logprobs: list[float]
    """Of each token under the model's own distribution (temperature 1, no cut), nats."""
    entropies: list[float]
    """Of that distribution at each token, nats."""
    stopped: bool
    """Ended by a stop token; False: by max_new_tokens or the context."""


@dataclass(frozen=True)
class Written:
    """What one replica of the model wrote, sequence after sequence."""

    sequences: np.ndarray
    """[m] int64: prompt * num_samples + sample, ascending."""
    lengths: np.ndarray
    """[m] int64 tokens of each."""
    stopped: np.ndarray
    """[m] bool"""
    tokens: np.ndarray
    """[sum of lengths] int64"""
    logprobs: np.ndarray
    """[sum of lengths] float64"""
    entropies: np.ndarray
    """[sum of lengths] float64"""
    not_finite: tuple[int, int] | None = None
    """Sequence without a next token, for its logits are not finite, and the tokens that it has.
    Nothing else is complete then, on any replica."""


class Record:
    """Collects one token per sequence and step, and sorts them by sequence at the end."""

    def __init__(self) -> None:
        self.steps: list[tuple[np.ndarray, np.ndarray]] = []
        self.stopped: list[np.ndarray] = []

    def add(self, sequences: np.ndarray, values: np.ndarray) -> None:
        """Keep [3, n] tokens, log-probabilities and entropies of n sequences."""
        self.steps.append((sequences.copy(), values))

    def stop(self, sequences: np.ndarray) -> None:
        """Note the sequences that a stop token ended."""
        self.stopped.append(sequences)

    def written(self, sequences: np.ndarray, not_finite: tuple[int, int] | None) -> Written:
        """Return all that was kept of the given sequences, which have a token each, ascending."""
        numbers = np.concatenate([np.empty(0, np.int64), *(step[0] for step in self.steps)])
        values = np.concatenate([np.empty((3, 0)), *(step[1] for step in self.steps)], axis=1)
        order = np.argsort(numbers, kind="stable")
        stopped = np.concatenate([np.empty(0, np.int64), *self.stopped])
        return Written(
            sequences,
            np.unique(numbers, return_counts=True)[1],
            np.isin(sequences, stopped),
            values[0, order].astype(np.int64),
            values[1, order],
            values[2, order],
            not_finite,
        )


def gather_answers(
    written: Written, num_samples: int, group: torch.distributed.ProcessGroup
) -> list[Answer]:
    """Return all answers by (prompt, sample) on every rank. Collective over `group`.

    Raises:
        UserError: on every rank, if one replica has a sequence whose logits are not finite.
    """
    parts: list[Written] = [written] * group.size()
    if group.size() > 1:
        torch.distributed.all_gather_object(parts, written, group=group)
    not_finite = [part.not_finite for part in parts if part.not_finite is not None]
    if not_finite:
        number, num_tokens = min(not_finite)
        raise UserError(
            f"the model's logits are not finite after {num_tokens} tokens of prompt "
            f"{number // num_samples}: the weights have diverged; take an earlier checkpoint, and "
            "train on from there with a smaller optim.lr"
        )
    answers = [answer for part in parts for answer in _answers(part, num_samples)]
    return sorted(answers, key=lambda answer: (answer.prompt, answer.sample))


def _answers(written: Written, num_samples: int) -> Sequence[Answer]:
    ends = np.cumsum(written.lengths)
    answers = []
    for number, end, length, stopped in zip(
        written.sequences.tolist(), ends, written.lengths, written.stopped.tolist(), strict=True
    ):
        own = slice(end - length, end)
        answers.append(
            Answer(
                prompt=number // num_samples,
                sample=number % num_samples,
                tokens=written.tokens[own].tolist(),
                logprobs=written.logprobs[own].tolist(),
                entropies=written.entropies[own].tolist(),
                stopped=stopped,
            )
        )
    return answers
