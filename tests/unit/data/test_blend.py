"""The schedule of domains: exact shares at every prefix."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ring_train.data import blend
from ring_train.data.blend import BLOCK_SAMPLES, BlendSchedule, block_states, reduced_shares

SKEWED = st.one_of(
    st.integers(0, 1000), st.integers(1, 10**12), st.sampled_from([1, 10**6, 10**9, 2**40])
)
SHARES = st.lists(SKEWED, min_size=1, max_size=64).filter(any)


def largest_deviation(domains: list[int], shares: list[int]) -> Fraction:
    """Return the largest |count - share| over all prefixes and domains, exactly."""
    total = sum(shares)
    largest = 0
    counts = [0] * len(shares)
    for n, domain in enumerate(domains, start=1):
        counts[domain] += 1
        for count, share in zip(counts, shares, strict=True):
            largest = max(largest, abs(count * total - n * share))
    return Fraction(largest, total)


@settings(max_examples=60, deadline=None)
@given(SHARES, st.integers(1, 300))
@example([1] * 64, 300)
@example([1] * 63 + [10**6], 300)
@example([2**n for n in range(64)], 300)
def test_every_prefix_is_within_one_sample_of_its_shares(
    shares: list[int], num_samples: int
) -> None:
    schedule = BlendSchedule(shares, num_samples)
    domains = [schedule.position(n)[0] for n in range(num_samples)]
    slack = Fraction(1, max(2, 2 * sum(share > 0 for share in shares) - 2))
    assert largest_deviation(domains, shares) <= 1 - slack  # Tijdeman's bound, below one sample


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any), st.integers(1, 200))
def test_samples_of_a_domain_are_numbered_without_gaps(shares: list[int], num: int) -> None:
    schedule = BlendSchedule(shares, num)
    following = [0] * len(shares)
    for sample in range(num):
        assert schedule.counts(sample).tolist() == following
        domain, index = schedule.position(sample)
        assert index == following[domain]
        following[domain] += 1
    assert schedule.counts(num).tolist() == following


@settings(deadline=None)
@given(SHARES, st.integers(1, 100))
def test_a_longer_run_begins_with_the_shorter_one(shares: list[int], num_samples: int) -> None:
    short, long = BlendSchedule(shares, num_samples), BlendSchedule(shares, 3 * num_samples)
    for sample in range(num_samples):
        assert short.position(sample) == long.position(sample)


def test_blocks_join_and_random_access_equals_the_walk() -> None:
    shares = [5003, 3001, 1, 0, 17]
    schedule = BlendSchedule(shares, sum(shares))
    walked = [schedule.position(n) for n in range(sum(shares))]
    assert largest_deviation([domain for domain, _ in walked], shares) < 1
    assert [sum(d == k for d, _ in walked) for k in range(5)] == shares
    for sample in (BLOCK_SAMPLES - 1, BLOCK_SAMPLES, 5000, sum(shares) - 1):
        assert BlendSchedule(shares, sum(shares)).position(sample) == walked[sample]


def test_compiled_and_interpreted_schedules_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    shares, num_samples = [1_000_003, 999_331, 17, 12_345_678], 5 * BLOCK_SAMPLES
    interpreted = block_states(shares, num_samples)
    monkeypatch.setattr(blend, "INTERPRETED_STEPS", 0)
    assert np.array_equal(block_states(shares, num_samples), interpreted)


def test_a_long_plan_holds_at_every_block_and_at_random_prefixes() -> None:
    rng = np.random.default_rng(3)
    shares = rng.integers(1, 10**6, 12).tolist()
    shares[0] += 1 + (sum(shares) % 2)  # coprime: nothing to reduce
    total = sum(shares)
    schedule = BlendSchedule(shares, total)
    assert schedule.period == total
    assert schedule.counts(total).tolist() == shares
    states = block_states(shares, total)
    prefixes = np.arange(len(states)) * BLOCK_SAMPLES
    assert (states.sum(1) == prefixes).all()
    bound = total * (1 - 1 / 22)
    assert (abs(states * total - prefixes[:, None] * np.array(shares)) <= bound).all()
    for prefix in rng.integers(1, total, 50).tolist():
        counts = schedule.counts(prefix)
        assert counts.sum() == prefix
        assert (abs(counts * total - prefix * np.array(shares)) <= bound).all()


def test_the_schedule_repeats_after_its_shares() -> None:
    schedule = BlendSchedule([35, 25, 40], 3 * 10**9)
    assert schedule.period == 20
    domain, index = schedule.position(20 * 10**8 + 3)
    first_domain, first_index = schedule.position(3)
    assert (domain, index) == (first_domain, first_index + 10**8 * [7, 5, 8][domain])
    assert schedule.counts(20 * 10**8).tolist() == [7 * 10**8, 5 * 10**8, 8 * 10**8]


@pytest.mark.parametrize("shares", [[], [0, 0], [1, -1]])
def test_shares_without_a_positive_one_are_refused(shares: list[int]) -> None:
    with pytest.raises(ValueError, match="one of them positive"):
        reduced_shares(shares)
