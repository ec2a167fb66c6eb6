"""Which sequence is in which slot, and what the next row holds. Host only; numpy over slots.

Sequences lie in slots 0 to n - 1 without gaps. A row holds one token of each of them and, while
there is room, whole prompts that wait: samples of one prompt that are admitted together share one
document. After the row every one of them has one more token; those that end free their slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ring_train.generation.answers import Record, Written
from ring_train.generation.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Step:
    """One row, before it is a tensor."""

    tokens: np.ndarray
    """[t] int64: of the sequences in slots, then of prompts, then padding."""
    position_ids: np.ndarray
    """[t] int64"""
    num_sequences: int
    """n: tokens that go on with a slot's sequence."""
    lengths: np.ndarray
    """[n] int64 tokens of each before this row."""
    documents: tuple[int, ...]
    """Lengths of the prompts and, last, of the padding."""
    sources: np.ndarray
    """[admitted] int64: document of each sequence that takes the slots from n on."""
    num_padding: int

    @property
    def outputs(self) -> np.ndarray:
        """[n + admitted] int64: the token after which each sequence goes on, in slot order."""
        n = self.num_sequences
        ends = n + np.cumsum(np.array(self.documents, dtype=np.int64)) - 1
        return np.concatenate([np.arange(n), ends[self.sources]])


class Slots:
    """The sequences of one replica of the model.

    Args:
        prompts: token ids of all prompts.
        sequences: numbers prompt * num_samples + sample of those of this replica, in the order in
            which they are admitted; samples of one prompt next to each other.
        num_samples: answers to each prompt.
        sampling: when an answer ends.
        context: tokens of the longest sequence.
        max_batch_size: the most sequences at a time.
        max_prefill_tokens: the most prompt tokens of a row, unless one prompt alone has more.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        sequences: Sequence[int],
        *,
        num_samples: int,
        sampling: Sampling,
        context: int,
        max_batch_size: int,
        max_prefill_tokens: int,
    ) -> None:
        self.prompts = prompts
        self.waiting = list(sequences)
        self.all = np.array(sorted(sequences), dtype=np.int64)
        self.num_samples = num_samples
        self.max_new_tokens, self.context = sampling.max_new_tokens, context
        self.stop_tokens = np.array(sampling.stop_tokens, dtype=np.int64)
        self.max_prefill_tokens = max_prefill_tokens
        self.num_slots = min(max_batch_size, len(sequences))
        self.num_admitted = 0
        self.n = 0
        # Rows: sequence, tokens in the caches, tokens written, last token.
        self.state = np.zeros((4, self.num_slots), dtype=np.int64)
        self.record = Record()
        self.not_finite: tuple[int, int] | None = None

    @property
    def is_busy(self) -> bool:
        """Whether something is left to do; nothing is after a sequence without a next token."""
        if self.not_finite is not None:
            return False
        return self.n > 0 or self.num_admitted < len(self.waiting)

    @property
    def sequences(self) -> np.ndarray:
        """[n] numbers of the sequences in slots."""
        return self.state[0, : self.n]

    @property
    def written(self) -> np.ndarray:
        """[n] tokens that each of them has written."""
        return self.state[2, : self.n]

    def next_step(self, multiple: int) -> Step:
        """Admit what there is room for and return the next row, padded to a multiple.

        With nothing to do it is a row of padding.
        """
        n, lengths = self.n, self.state[1, : self.n].copy()
        documents, sources = self._admit()
        sizes = [len(document) for document in documents]
        num_padding = -(n + sum(sizes)) % multiple if n or sizes else multiple
        if num_padding:
            documents.append(np.zeros(num_padding, dtype=np.int64))
            sizes.append(num_padding)
        step = Step(
            tokens=np.concatenate([self.state[3, :n], *documents]),
            position_ids=np.concatenate([lengths, *map(np.arange, sizes)]),
            num_sequences=n,
            lengths=lengths,
            documents=tuple(sizes),
            sources=sources,
            num_padding=num_padding,
        )
        self.state[1, :n] += 1
        self.n = n + len(sources)
        return step

    def _admit(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the prompts of the next row, and which of them each admitted sequence follows."""
        documents: list[np.ndarray] = []
        sources: list[int] = []
        prompt, tokens = -1, 0
        waiting = self.waiting[self.num_admitted : self.num_admitted + self.num_slots - self.n]
        for slot, number in enumerate(waiting, start=self.n):
            if number // self.num_samples != prompt:
                prompt = number // self.num_samples
                tokens += len(self.prompts[prompt])
                if documents and tokens > self.max_prefill_tokens:
                    break
                documents.append(np.asarray(self.prompts[prompt], dtype=np.int64))
            sources.append(len(documents) - 1)
            self.state[:, slot] = number, len(documents[-1]), 0, 0
        self.num_admitted += len(sources)
        return documents, np.array(sources, dtype=np.int64)

    def take(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Give every sequence in a slot its next token and free the slots of those that end.

        Args:
            values: [3, n] tokens, log-probabilities and entropies, in slot order; a
                log-probability that is NaN says that this sequence has no next token.

        Returns:
            (sources, targets): slots to copy over others, so that no gap is left; None for none.
        """
        n, state = self.n, self.state[:, : self.n]
        wrong = state[:, np.isnan(values[1])]
        if wrong.size:
            self.not_finite = min(zip(wrong[0].tolist(), wrong[2].tolist(), strict=True))
            return None
        tokens = values[0].astype(np.int64)
        self.record.add(state[0], values)
        state[2] += 1
        state[3] = tokens
        stopped = np.isin(tokens, self.stop_tokens)
        self.record.stop(state[0, stopped])
        ended = stopped | (state[2] == self.max_new_tokens) | (state[1] + 1 == self.context)
        if not ended.any():
            return None
        self.n = n - int(ended.sum())
        targets = np.flatnonzero(ended[: self.n])
        sources = self.n + np.flatnonzero(~ended[self.n :])
        state[:, targets] = state[:, sources]
        return (sources, targets) if len(sources) else None

    def finished(self) -> Written:
        """Return what all sequences have written."""
        return self.record.written(self.all, self.not_finite)


def deal(num_prompts: int, num_samples: int, replicas: int, rank: int) -> list[int]:
    """Return the numbers prompt * num_samples + sample that a replica works on.

    Replicas differ by one sequence at most. Prompts are taken with a stride, so that an order by
    length does not give one replica all the long ones; samples of a prompt stay together.
    """
    order = sorted(range(num_prompts), key=lambda prompt: (prompt % replicas, prompt))
    numbers = [prompt * num_samples + sample for prompt in order for sample in range(num_samples)]
    return numbers[len(numbers) * rank // replicas : len(numbers) * (rank + 1) // replicas]
