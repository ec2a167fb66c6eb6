"""Which domain a global sample comes from: at every prefix each is within one sample of its share.

Jobs of unit length: the j-th sample of a domain is released and due such that meeting both keeps
its count within 1 - 1/(2k - 2) of its share, k domains. All can be met (R. Tijdeman, The chairman
assignment problem, Discrete Mathematics 32, 1980), and earliest deadline first meets them.
"""

import dataclasses
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class BlendSchedule:
    """One period of the schedule, or as much of it as a run needs."""

    domains: np.ndarray
    """[period] int16: the domain of each sample."""
    indices: np.ndarray
    """[period] int64: how many samples of that domain precede it in the period."""
    counts: np.ndarray
    """[domains] int64: samples of each domain in the period."""
    repeats: bool
    """Whether the period is whole, so that any sample index has a position."""

    def position(self, sample: int) -> tuple[int, int]:
        """Return (domain, index of the sample within the domain) of a global sample index."""
        assert self.repeats or sample < len(self.domains), f"sample {sample} was not planned"
        period, offset = divmod(sample, len(self.domains))
        domain = int(self.domains[offset])
        return domain, int(self.indices[offset]) + period * int(self.counts[domain])


def make_schedule(weights: Sequence[float], num_samples: int) -> BlendSchedule:
    """Return the schedule of samples 0..num_samples-1; longer ones begin with it.

    A pure function of the weights, in integers: they count as the decimal numbers that they print
    as, so 0.35, 0.25, 0.40 have a period of 20 samples.

    Raises:
        ValueError: no weight, or one that is not positive and finite.
    """
    if not weights or not all(math.isfinite(w) and w > 0 for w in weights):
        raise ValueError(
            f"weights {list(weights)} must be positive; remove a domain to leave it out"
        )
    shares = _integer_shares(weights)
    period = min(sum(shares), max(1, num_samples))
    domains = np.array(_schedule(shares, period), dtype=np.int16)
    indices = np.empty(period, dtype=np.int64)
    counts = np.bincount(domains, minlength=len(shares))
    for domain, count in enumerate(counts):
        indices[domains == domain] = np.arange(count)
    return BlendSchedule(domains, indices, counts, repeats=period == sum(shares))


def _integer_shares(weights: Sequence[float]) -> list[int]:
    """Return the smallest integers in the proportion of the weights."""
    fractions = [Fraction(repr(float(weight))) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*integers)
    return [integer // divisor for integer in integers]


def _schedule(shares: list[int], num_samples: int) -> list[int]:
    """Return the domain of each of the first samples; the order repeats after sum(shares)."""
    if len(shares) == 1:
        return [0] * num_samples
    total, slack = sum(shares), 2 * len(shares) - 2
    waiting = [(_release(share, 1, total, slack), d) for d, share in enumerate(shares)]
    heapq.heapify(waiting)
    ready: list[tuple[int, int]] = []
    taken = [0] * len(shares)
    schedule = []
    for step in range(1, num_samples + 1):
        while waiting and waiting[0][0] <= step:
            _, domain = heapq.heappop(waiting)
            heapq.heappush(ready, (_due(shares[domain], taken[domain] + 1, total, slack), domain))
        _, domain = heapq.heappop(ready)
        schedule.append(domain)
        taken[domain] += 1
        heapq.heappush(waiting, (_release(shares[domain], taken[domain] + 1, total, slack), domain))
    return schedule


def _release(share: int, j: int, total: int, slack: int) -> int:
    """Return the first step n with n * share/total - (j - 1) >= 1/slack."""
    return -(-total * ((j - 1) * slack + 1) // (share * slack))


def _due(share: int, j: int, total: int, slack: int) -> int:
    """Return the step before which j - 1 samples keep n * share/total - (j - 1) <= 1 - 1/slack."""
    return total * (j * slack - 1) // (share * slack) + 1
