"""A run stops early enough for a step, two saves and the margin."""

import math
import time

import pytest

from ring_train.errors import UserError
from ring_train.resilience.deadline import DEADLINE_VARIABLE, SLACK, Deadline, read_deadline


def test_the_reserve_is_what_was_measured() -> None:
    deadline = Deadline(math.inf, margin_s=10)
    assert deadline.reserved_s == 10
    deadline.note_step(2)
    deadline.note_save(30)
    deadline.note_save(20)
    assert deadline.reserved_s == 10 + SLACK * (2 + 2 * 30)


def test_one_slow_step_is_forgotten_in_time() -> None:
    deadline = Deadline(math.inf, margin_s=0)
    deadline.note_step(100)
    for _ in range(60):
        deadline.note_step(1)
    assert deadline.reserved_s == pytest.approx(SLACK, rel=0.2)


def test_the_end_is_near_when_only_the_reserve_is_left() -> None:
    deadline = Deadline(time.time() + 60, margin_s=10)
    assert not deadline.is_near()
    deadline.note_save(17)  # 1.5 * 34 + 10 = 61 s
    assert deadline.is_near()


def test_without_a_launcher_there_is_no_deadline() -> None:
    assert read_deadline({}) == math.inf
    assert not Deadline(math.inf, margin_s=10).is_near()


def test_the_launcher_says_when() -> None:
    assert read_deadline({DEADLINE_VARIABLE: "1795900000"}) == 1795900000


@pytest.mark.parametrize("text", ["soon", "-5", "nan", "0"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"{DEADLINE_VARIABLE}='{text}' is not a time"):
        read_deadline({DEADLINE_VARIABLE: text})
