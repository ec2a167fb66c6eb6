"""Learning rates at the steps where a schedule turns, and between them."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_train.config import LrDecayStyle, OptimConfig, compose
from ring_train.train.schedule import learning_rate

LR, MIN_LR, WARMUP, ANNEAL, NUM_STEPS = 1.0, 0.1, 4, 5, 20


@functools.cache
def optim(style: LrDecayStyle) -> OptimConfig:
    """Return a schedule with a warm-up of 4 steps and, for wsd, an anneal of 5."""
    base = compose("pretrain", ["model=tiny"]).optim
    anneal = ANNEAL if style is LrDecayStyle.wsd else 0
    return replace(
        base,
        lr=LR,
        min_lr=MIN_LR,
        lr_decay_style=style,
        lr_warmup_steps=WARMUP,
        wsd_decay_steps=anneal,
    )


def rates(style: LrDecayStyle, **changes: Any) -> list[float]:
    changed = replace(optim(style), **changes)
    return [learning_rate(changed, step, NUM_STEPS) for step in range(NUM_STEPS)]


@pytest.mark.parametrize("style", LrDecayStyle)
def test_warm_up_is_linear_from_the_first_step_and_ends_at_the_peak(style: LrDecayStyle) -> None:
    assert rates(style)[:WARMUP] == pytest.approx([0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize("style", LrDecayStyle)
def test_without_warm_up_the_first_step_is_not_zero(style: LrDecayStyle) -> None:
    line = LR - (LR - MIN_LR) / NUM_STEPS
    assert rates(style, lr_warmup_steps=0)[0] >= line - 1e-12


def test_constant_stays_at_the_peak() -> None:
    assert rates(LrDecayStyle.constant)[WARMUP:] == [LR] * (NUM_STEPS - WARMUP)


def test_cosine_falls_from_the_peak_to_the_minimum_at_the_last_step() -> None:
    found = rates(LrDecayStyle.cosine)[WARMUP - 1 :]
    assert found[0] == LR
    assert found[len(found) // 2] == pytest.approx((LR + MIN_LR) / 2)
    assert found[-1] == pytest.approx(MIN_LR)
    assert found == sorted(found, reverse=True)


def test_linear_falls_from_the_peak_to_the_minimum_at_the_last_step() -> None:
    found = rates(LrDecayStyle.linear)[WARMUP - 1 :]
    steps = np.diff(found)
    assert found[0] == LR
    assert found[-1] == pytest.approx(MIN_LR)
    assert steps == pytest.approx(np.full(len(steps), (MIN_LR - LR) / len(steps)))


@pytest.mark.parametrize(("fraction", "steps"), [(0.0, 0), (0.01, 1), (0.1, 2), (0.18, 4)])
def test_a_warm_up_may_be_a_fraction_of_all_steps(fraction: float, steps: int) -> None:
    style = LrDecayStyle.linear
    assert rates(style, lr_warmup_steps=0, lr_warmup_fraction=fraction) == rates(
        style, lr_warmup_steps=steps
    )


def test_wsd_is_constant_then_linear_to_the_minimum_at_the_last_step() -> None:
    found = rates(LrDecayStyle.wsd)
    assert found[WARMUP : NUM_STEPS - ANNEAL] == [LR] * (NUM_STEPS - ANNEAL - WARMUP)
    assert found[NUM_STEPS - ANNEAL :] == pytest.approx([0.82, 0.64, 0.46, 0.28, 0.1])


def test_wsd_may_anneal_right_after_the_warm_up() -> None:
    found = rates(LrDecayStyle.wsd, wsd_decay_steps=NUM_STEPS - WARMUP)
    assert found[WARMUP - 1] == LR
    assert found[WARMUP] < LR
    assert found[-1] == pytest.approx(MIN_LR)


def test_wsd_without_an_anneal_stays_at_the_peak() -> None:
    assert rates(LrDecayStyle.wsd, wsd_decay_steps=0)[WARMUP:] == [LR] * (NUM_STEPS - WARMUP)


@given(
    style=st.sampled_from(list(LrDecayStyle)),
    warmup=st.integers(0, 30),
    anneal=st.integers(1, 30),
    rest=st.integers(1, 30),
)
def test_rates_lie_between_the_first_warm_up_step_and_the_peak(
    style: LrDecayStyle, warmup: int, anneal: int, rest: int
) -> None:
    num_steps = warmup + anneal + rest
    changed = replace(optim(style), lr_warmup_steps=warmup, wsd_decay_steps=anneal)
    found = [learning_rate(changed, step, num_steps) for step in range(num_steps)]
    assert max(found) <= LR
    assert min(found[warmup:]) >= MIN_LR - 1e-12
    assert found[warmup:] == sorted(found[warmup:], reverse=True)
    assert found[:warmup] == sorted(found[:warmup])
