"""The schedule of domains: exact shares at every prefix."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ring_train.data.blend import make_schedule

SKEWED = st.one_of(
    st.integers(1, 1000).map(float),
    st.floats(1e-6, 1.0, allow_nan=False),
    st.sampled_from([0.1, 0.25, 0.3, 1e-4]),
)


def largest_deviation(domains: np.ndarray, weights: list[float]) -> Fraction:
    """Return the largest |count - share| over all prefixes and domains, exactly."""
    shares = [Fraction(repr(weight)) for weight in weights]
    total = sum(shares)
    largest = Fraction(0)
    counts = [0] * len(weights)
    for n, domain in enumerate(domains.tolist(), start=1):
        counts[domain] += 1
        for count, share in zip(counts, shares, strict=True):
            largest = max(largest, abs(count - n * share / total))
    return largest


@settings(max_examples=60, deadline=None)
@given(st.lists(SKEWED, min_size=1, max_size=64), st.integers(1, 300))
@example([1.0] * 64, 300)
@example([1e-6] * 63 + [1.0], 300)
@example([float(2**n) for n in range(64)], 300)
def test_every_prefix_is_within_one_sample_of_its_shares(
    weights: list[float], num_samples: int
) -> None:
    schedule = make_schedule(weights, num_samples)
    domains = np.array([schedule.position(n)[0] for n in range(num_samples)])
    slack = Fraction(1, max(1, 2 * len(weights) - 2))  # Tijdeman's bound, below one sample
    assert largest_deviation(domains, weights) <= 1 - slack


@given(st.lists(st.integers(1, 9).map(float), min_size=1, max_size=6), st.integers(1, 200))
def test_samples_of_a_domain_are_numbered_without_gaps(
    weights: list[float], num_samples: int
) -> None:
    schedule = make_schedule(weights, num_samples)
    following = [0] * len(weights)
    for sample in range(num_samples):
        domain, index = schedule.position(sample)
        assert index == following[domain]
        following[domain] += 1


@given(st.lists(SKEWED, min_size=1, max_size=8), st.integers(1, 100))
def test_a_longer_run_begins_with_the_shorter_one(weights: list[float], num_samples: int) -> None:
    short, long = make_schedule(weights, num_samples), make_schedule(weights, 3 * num_samples)
    for sample in range(num_samples):
        assert short.position(sample) == long.position(sample)


def test_the_schedule_of_decimal_weights_has_a_short_period() -> None:
    schedule = make_schedule([0.35, 0.25, 0.40], 10**9)
    assert schedule.counts.tolist() == [7, 5, 8]
    domain, index = schedule.position(20 * 10**8 + 3)
    first_domain, first_index = schedule.position(3)
    assert (domain, index) == (first_domain, first_index + 10**8 * [7, 5, 8][domain])


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_weights_that_are_not_positive_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        make_schedule(weights, 10)
