"""Steps and ranks to trace that there are not, are refused before anything starts."""

import pytest

from ring_train.config import compose
from ring_train.plan import make_plan
from ring_train.plan.problems import PlanError


@pytest.mark.parametrize("steps", ["[3,2]", "[0,2]", "[3]", "[1,2,3]"])
def test_steps_to_trace_are_a_range(steps: str) -> None:
    with pytest.raises(PlanError, match=r"profile_steps=.* first <= last; name two"):
        make_plan(compose("pretrain", ["model=tiny", f"logging.profile_steps={steps}"]), 1)


def test_ranks_to_trace_exist() -> None:
    words = ["model=tiny", "logging.profile_ranks=[0,2]"]
    with pytest.raises(PlanError, match=r"\[2\] are not among 2 ranks; choose from 0 to 1"):
        make_plan(compose("pretrain", words), 2)
    assert make_plan(compose("pretrain", words), 4)
