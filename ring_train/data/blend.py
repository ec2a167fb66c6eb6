"""Which domain a sample comes from: at every prefix each is within one sample of its share.

Jobs of unit length: the j-th sample of a domain is released and due such that meeting both keeps
its count within 1 - 1/(2k - 2) of its share, k domains. All can be met (R. Tijdeman, The chairman
assignment problem, Discrete Mathematics 32, 1980), and earliest deadline first meets them.

The state of the schedule is only how often each domain was taken. It is kept at the start of every
block of samples; inside a block the schedule is run again, so any sample is found in milliseconds
and a billion samples need megabytes.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ring_train.data.compiled import quick

BLOCK_SAMPLES = 4096
INTERPRETED_STEPS = 20_000
FAR = 1 << 62


class BlendSchedule:
    """The order of domains; it repeats after sum(shares) samples.

    Args:
        shares: integer share of each domain, 0 for one that is left out. They are reduced first.
        num_samples: how many samples will be asked for at most.
        states: what `block_states` returns for these arguments, if it is at hand.
    """

    def __init__(
        self, shares: Sequence[int], num_samples: int, states: np.ndarray | None = None
    ) -> None:
        self.shares = reduced_shares(shares)
        self.period = sum(self.shares)
        self.num_samples = num_samples
        self._states = block_states(shares, num_samples) if states is None else states
        self._block = functools.lru_cache(maxsize=8)(self._make_block)

    def position(self, sample: int) -> tuple[int, int]:
        """Return (domain, how many samples of that domain come before) of a sample index."""
        period, block, offset = self._place(sample)
        domains, before = self._block(block)
        domain = int(domains[offset])
        return domain, int(before[offset]) + period * self.shares[domain]

    def counts(self, sample: int) -> np.ndarray:
        """Return [domains] int64: samples of each domain among the first `sample` ones."""
        if sample == 0:
            return np.zeros(len(self.shares), dtype=np.int64)
        period, block, offset = self._place(sample - 1)
        domains, _ = self._block(block)
        inside = np.bincount(domains[: offset + 1], minlength=len(self.shares))
        return period * np.array(self.shares) + self._states[block] + inside

    def _place(self, sample: int) -> tuple[int, int, int]:
        assert 0 <= sample < self.num_samples, f"sample {sample} of {self.num_samples}"
        period, index = divmod(sample, self.period)
        return period, *divmod(index, BLOCK_SAMPLES)

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (domain [block], earlier samples of that domain in the period [block])."""
        steps = min(BLOCK_SAMPLES, self.period - block * BLOCK_SAMPLES)
        domains, before = [0] * steps, [0] * steps
        state = _state(self.shares, self._states[block].tolist())
        _advance(state, block * BLOCK_SAMPLES, domains, before)
        return np.array(domains, dtype=np.int16), np.array(before, dtype=np.int64)


def reduced_shares(shares: Sequence[int]) -> tuple[int, ...]:
    """Return the smallest integers in the same proportion.

    Raises:
        ValueError: none is positive, or one is negative.
    """
    if not any(shares) or min(shares) < 0:
        raise ValueError(f"shares {list(shares)} must be 0 or more, and one of them positive")
    divisor = math.gcd(*shares)
    return tuple(int(share) // divisor for share in shares)


def num_block_states(shares: Sequence[int], num_samples: int) -> int:
    """Return how many blocks the first `num_samples` samples touch within a period."""
    period = min(sum(reduced_shares(shares)), max(1, num_samples))
    return -(-period // BLOCK_SAMPLES)


def block_states(shares: Sequence[int], num_samples: int) -> np.ndarray:
    """Return [blocks, domains] int64: samples of each domain before each block.

    Takes about 30 ns per sample of one period at eight domains.
    """
    reduced = reduced_shares(shares)
    blocks = num_block_states(shares, num_samples)
    states = np.zeros((blocks, len(reduced)), dtype=np.int64)
    steps = (blocks - 1) * BLOCK_SAMPLES  # what the last block does is seen when it is run
    state: Any = _state(reduced, [0] * len(reduced))
    unread: Any = [0] * BLOCK_SAMPLES
    fits = _slack(reduced) * sum(reduced) < FAR  # in 64 bits; Python's integers have no end
    advance = quick(_advance, steps if fits else 0, INTERPRETED_STEPS)
    if advance is not _advance:
        state = np.array(state, dtype=np.int64)
        unread = np.zeros(BLOCK_SAMPLES, dtype=np.int64)
    for block in range(1, blocks):
        advance(state, (block - 1) * BLOCK_SAMPLES, unread, unread)
        states[block] = state[-1]
    return states


def _state(shares: Sequence[int], taken: Sequence[int]) -> list[list[int]]:
    """Return shares, release steps, deadlines (each with its remainder) and what was taken.

    Job j of a domain may run at step n if n * share/total - (j - 1) >= 1/slack, and must if waiting
    would make it exceed 1 - 1/slack; slack = 2k - 2. Kept as quotient and remainder by share*slack.
    """
    total, slack = sum(shares), _slack(shares)
    columns = []
    for share, count in zip(shares, taken, strict=True):
        if share == 0:
            columns.append((0, FAR, 0, FAR, 0, count))
            continue
        released = total * (count * slack + 1)
        due = total * ((count + 1) * slack - 1)
        release = -(-released // (share * slack))
        columns.append(
            (
                *(share, release, released - release * share * slack),
                *(due // (share * slack), due % (share * slack), count),
            )
        )
    return [list(row) for row in zip(*columns, strict=True)]


def _slack(shares: Sequence[int]) -> int:
    return max(2, 2 * sum(share > 0 for share in shares) - 2)


def _advance(state: Any, first: int, domains: Any, before: Any) -> None:
    """Run earliest deadline first for len(domains) steps after `first`.

    Args:
        state: rows of one number a domain, as `_state` returns them; changed.
        first: samples already taken.
        domains: receives the domain of each step.
        before: receives how often it was taken before.
    """
    shares, releases, release_rests, dues, due_rests, taken = state
    k = len(shares)
    total = 0
    active = 0
    for d in range(k):
        total += shares[d]
        active += shares[d] > 0
    slack = max(2, 2 * active - 2)
    for step in range(len(domains)):
        best = -1
        for d in range(k):
            if releases[d] <= first + step + 1 and (best < 0 or dues[d] < dues[best]):
                best = d
        domains[step] = best
        before[step] = taken[best]
        taken[best] += 1
        share = shares[best]
        quotient, rest = total // share, (total % share) * slack
        releases[best] += quotient
        release_rests[best] += rest
        if release_rests[best] > 0:
            releases[best] += 1
            release_rests[best] -= share * slack
        dues[best] += quotient
        due_rests[best] += rest
        if due_rests[best] >= share * slack:
            dues[best] += 1
            due_rests[best] -= share * slack
