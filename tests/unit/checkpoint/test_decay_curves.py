"""Weights of merged checkpoints: what the curves promise, at any distances."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_train.checkpoint.decay_curves import CURVES, checkpoint_weights, update_weights
from ring_train.config import DecayCurve

FP64_ROUNDING = 1e-12
STEPS = st.lists(st.integers(0, 10**6), min_size=2, max_size=40, unique=True).map(sorted)


def test_every_curve_has_a_name() -> None:
    assert CURVES.keys() == set(DecayCurve)


@given(steps=STEPS, curve=st.sampled_from(DecayCurve))
def test_weights_are_an_average_that_only_decays(steps: list[int], curve: DecayCurve) -> None:
    weights, updates = checkpoint_weights(curve, steps), update_weights(curve, steps)
    assert sum(weights) == pytest.approx(1, abs=FP64_ROUNDING)
    assert min(weights) >= 0
    assert updates[0] == 1
    assert all(this >= following for this, following in itertools.pairwise(updates))
    for number, update in enumerate(updates):
        assert sum(weights[number:]) == pytest.approx(update, abs=FP64_ROUNDING)


@pytest.mark.parametrize(
    ("curve", "weights"),
    [
        (DecayCurve.linear, [0.25, 0.25, 0.25, 0.25]),
        (DecayCurve.cosine, [0.1464466, 0.3535534, 0.3535534, 0.1464466]),
        (DecayCurve.one_minus_sqrt, [0.5, 0.2071068, 0.1589186, 0.1339746]),
        (DecayCurve.constant, [0.0, 0.0, 0.0, 1.0]),
    ],
)
def test_weights_at_equal_distances(curve: DecayCurve, weights: list[float]) -> None:
    assert checkpoint_weights(curve, [100, 150, 200, 250]) == pytest.approx(weights, abs=1e-7)


def test_a_wide_gap_weighs_more() -> None:
    """Linear: the weight of a checkpoint is the distance to the next."""
    weights = checkpoint_weights(DecayCurve.linear, [0, 10, 40])
    assert weights == pytest.approx([10 / 60, 30 / 60, 20 / 60])
