"""A step is judged by figures that all ranks share, and the ladder of decisions is bounded."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_train.config import ResilienceConfig
from ring_train.resilience.policy import Cause, Decision, Troubles, decide, judge

SPIKES = ResilienceConfig(spike_sigma=6.0, spike_window_steps=8)
STEADY = [(2.0, 1.0), (2.1, 1.1), (1.9, 0.9), (2.05, 1.05), (1.95, 0.95)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_nan_and_inf_are_bad_in_loss_and_norm(bad: float, place: int) -> None:
    figures = [2.0, 1.0]
    figures[place] = bad
    assert judge((figures[0], figures[1]), [], ResilienceConfig()) is Cause.nonfinite


@pytest.mark.parametrize("figures", [(9.0, 1.0), (2.0, 9.0)])
def test_a_spike_in_loss_or_norm_is_bad(figures: tuple[float, float]) -> None:
    assert judge(figures, STEADY, SPIKES) is Cause.spike


def test_a_fall_is_no_spike() -> None:
    assert judge((0.1, 0.01), STEADY, SPIKES) is None


def test_spikes_are_judged_only_if_asked_for() -> None:
    assert judge((9.0, 9.0), STEADY, ResilienceConfig(spike_window_steps=8)) is None


def test_nothing_is_judged_before_half_of_the_window() -> None:
    assert judge((9.0, 9.0), STEADY[:3], SPIKES) is None
    assert judge((9.0, 9.0), STEADY[:4], SPIKES) is Cause.spike


def test_six_deviations_are_the_limit() -> None:
    # Of 1.9 .. 2.1 by hand: mean 2, sample deviation sqrt(0.025 / 4) = 0.0790569...
    deviation = math.sqrt(0.025 / 4)
    assert judge((2.0 + 5.99 * deviation, 1.0), STEADY, SPIKES) is None
    assert judge((2.0 + 6.01 * deviation, 1.0), STEADY, SPIKES) is Cause.spike


def test_the_ladder() -> None:
    policy = ResilienceConfig(max_skipped_in_a_row=2, max_roll_backs=1)
    assert decide(Troubles(), policy) is Decision.rerun
    assert decide(Troubles(reruns=1), policy) is Decision.skip
    assert decide(Troubles(reruns=1, in_a_row=1), policy) is Decision.skip
    assert decide(Troubles(reruns=1, in_a_row=2), policy) is Decision.roll_back
    assert decide(Troubles(reruns=1, in_a_row=2, roll_backs=1), policy) is Decision.stop


def test_without_reruns_a_bad_step_is_passed_over_at_once() -> None:
    assert decide(Troubles(), ResilienceConfig(rerun_bad_steps=False)) is Decision.skip


@given(
    rerun=st.booleans(), in_a_row=st.integers(0, 5), roll_backs=st.integers(0, 3), bad=st.just(True)
)
def test_a_run_that_is_bad_for_ever_stops(
    rerun: bool, in_a_row: int, roll_backs: int, bad: bool
) -> None:
    policy = ResilienceConfig(
        rerun_bad_steps=rerun, max_skipped_in_a_row=in_a_row, max_roll_backs=roll_backs
    )
    row = rolled = reruns = decisions = 0
    while bad:
        decision = decide(Troubles(reruns, row, rolled), policy)
        decisions += 1
        if decision is Decision.stop:
            break
        reruns = reruns + 1 if decision is Decision.rerun else 0
        row = row + 1 if decision is Decision.skip else row
        if decision is Decision.roll_back:
            row, rolled = 0, rolled + 1
    assert decisions <= (1 + rerun) * (in_a_row + 1) * (roll_backs + 1)
    assert rolled == roll_backs
