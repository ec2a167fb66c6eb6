"""A policy for bad steps that cannot be meant is refused."""

import pytest

from ring_train.config import compose
from ring_train.plan import PlanError, make_plan

WORDS = ["model=tiny", "optim=short", "train=cpu"]


@pytest.mark.parametrize(
    ("words", "relation"),
    [
        (["resilience.skip_steps=[0,5]"], r"resilience\.skip_steps=\[0\] are no steps of this run"),
        (["resilience.skip_steps=[101]"], r"numbered from 1 to train\.num_steps=100"),
        (
            ["resilience.spike_sigma=6", "resilience.spike_window_steps=3"],
            r"resilience\.spike_window_steps=3 is below 4",
        ),
        (["resilience.spike_sigma=0"], r"resilience\.spike_sigma=0\.0 is not positive"),
        (["resilience.hang_timeout_s=0"], r"resilience\.hang_timeout_s=0\.0 is not positive"),
        (["resilience.max_roll_backs=-1"], r"resilience\.max_roll_backs=-1 is negative"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], relation: str) -> None:
    with pytest.raises(PlanError, match=relation):
        make_plan(compose("pretrain", [*WORDS, *words]), 1)


def test_steps_of_the_run_can_be_passed_over() -> None:
    config = compose("pretrain", [*WORDS, "resilience.skip_steps=[1,100]"])
    assert make_plan(config, 1).config.resilience.skip_steps == [1, 100]
