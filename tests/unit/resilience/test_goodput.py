"""Every microsecond of a run has one cause, and a step counts once."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_train.resilience.goodput import make_account

Event = dict[str, Any]
T0 = 1_800_000_000.0
"""A Unix time like those of journals: floats near it are a quarter microsecond apart."""


def event(time: float, name: str, attempt: int = 1, step: int | None = None, **more: Any) -> Event:
    return {
        **{"time": T0 + time, "event": name, "attempt": attempt, "rank": 0, "step": step},
        **more,
    }


def progress(time: float, done: int, attempt: int = 1, /, **seconds: float) -> Event:
    return event(time, "progress", attempt, done, seconds=seconds)


def parts_of(events: list[Event], **more: Any) -> dict[str, float]:
    account = make_account(events, **more)
    assert sum(account.parts_us.values()) == account.total_us
    return {cause: us / 1e6 for cause, us in account.parts_us.items()}


BEGIN = [event(0, "start", world_size=2), event(5, "init"), event(10, "ready", seconds=10)]


def test_a_run_without_trouble() -> None:
    events = [*BEGIN, progress(20, 10, step=7, data=2, save=1), event(20, "finish", step=10)]
    assert parts_of(events) == {"startup": 10, "productive": 7, "data": 2, "save": 1}
    account = make_account(events)
    assert account.goodput == 7 / 20
    assert (account.failures, account.mtbf_s) == (0, None)
    (attempt,) = account.attempts
    assert (attempt.ending, attempt.first_step, attempt.last_step) == ("finished", 0, 10)


def test_time_between_records_without_a_cause_is_said() -> None:
    assert parts_of([*BEGIN, progress(20, 10, step=7)])["other"] == 3


def test_causes_that_claim_more_than_has_passed_get_their_share() -> None:
    parts = parts_of([*BEGIN, progress(20, 10, step=15, data=5)])
    assert parts == {"startup": 10, "productive": 7.5, "data": 2.5}


def test_steps_past_the_checkpoint_of_the_next_start_are_redone() -> None:
    events = [
        *BEGIN,
        progress(20, 10, step=10),
        progress(30, 20, step=10),
        event(130, "start", 2, previous_alive=T0 + 32),
        event(133, "resume", 2, 15),
        event(135, "ready", 2),
        progress(145, 25, 2, step=10),
        event(145, "finish", 2, 25),
    ]
    parts = parts_of(events)
    assert parts == {
        **{"startup": 15, "productive": 25, "redone": 5, "unknown": 2, "down": 98},
    }
    account = make_account(events)
    assert [attempt.ending for attempt in account.attempts] == ["killed", "finished"]
    assert account.mtbf_s == 145 - 98


def test_a_start_that_does_not_say_when_the_last_one_lived_ends_it_at_its_last_record() -> None:
    parts = parts_of([*BEGIN, progress(20, 10, step=10), event(30, "start", 2)])
    assert parts == {"startup": 10, "productive": 10, "down": 10}


def test_a_start_begins_when_its_process_did() -> None:
    second = event(30, "start", 2, launched=T0 + 22, previous_alive=T0 + 20)
    events = [event(0, "start", launched=T0 - 7), *BEGIN[1:], progress(20, 10, step=10), second]
    assert parts_of(events) == {"startup": 25, "productive": 10, "down": 2}


def test_work_is_lost_once_however_often_it_is_tried_again() -> None:
    events = [
        *BEGIN,
        progress(20, 10, step=10),
        event(20, "start", 2),
        event(20, "resume", 2, 4),
        progress(26, 10, 2, step=6),
        event(26, "start", 3),
        event(26, "init", 3),
        progress(36, 10, 3, step=10),
    ]
    assert parts_of(events) == {"startup": 10, "redone": 16, "productive": 10}


def test_a_roll_back_undoes_steps_of_this_interval_and_of_those_before() -> None:
    events = [
        *BEGIN,
        progress(20, 10, step=10),
        event(25, "bad_step", step=15, cause="spike", decision="roll_back"),
        event(25, "roll_back", from_step=15, to_step=8, skipped=[8, 15]),
        progress(34, 16, step=14),
    ]
    # 5 steps to 15, one bad try, 8 steps from 8 to 16: 14 of one second each.
    parts = parts_of(events)
    assert parts == {"startup": 10, "productive": 16, "redone": 7, "skipped": 1}


@pytest.mark.parametrize(("decision", "steps"), [("rerun", 9), ("skip", 10)])
def test_bad_steps_are_not_productive(decision: str, steps: int) -> None:
    bad = event(15, "bad_step", step=5, cause="nonfinite", decision=decision)
    parts = parts_of([*BEGIN, bad, progress(20, steps, step=10)])
    assert parts == {"startup": 10, "productive": 9, "skipped": 1}


def test_a_hang_is_told_apart_from_what_went_before() -> None:
    hang = event(50, "hang", step=12, phase="step", seconds=25)
    events = [*BEGIN, progress(20, 10, step=10), hang]
    assert parts_of(events) == {"startup": 10, "productive": 10, "unknown": 5, "hang": 25}
    assert make_account(events).attempts[0].detail == "rank 0 in step for 25 s"


def test_a_stop_after_the_last_progress_is_the_save() -> None:
    stop = [event(24, "saved", step=10), event(25, "stop", step=10, reason="SIGTERM")]
    parts = parts_of([*BEGIN, progress(20, 10, step=10), *stop])
    assert parts == {"startup": 10, "productive": 10, "save": 5}


def test_a_run_that_died_while_starting_was_starting() -> None:
    account = make_account([event(0, "start")], alive=T0 + 30)
    assert account.parts_us == {"startup": 30_000_000}
    assert account.attempts[0].ending == "killed"
    assert make_account([event(0, "start")], alive=T0, is_running=True).goodput is None


@pytest.mark.parametrize("name", ["stop", "error", "hang"])
def test_what_ends_before_the_first_step_was_starting(name: str) -> None:
    events = [event(0, "start"), event(7, "init"), event(9, name, seconds=3)]
    assert parts_of(events, alive=T0 + 50) == {"startup": 9}


def test_late_words_of_an_older_attempt_and_things_that_are_no_records_are_left_out() -> None:
    broken: list[Event] = [{}, {"time": "x", "event": "progress", "attempt": 1}, event(90, "", 1)]
    second = [event(20, "start", 2), event(20, "init", 2), event(30, "ready", 2)]
    events = [*broken, *BEGIN, *second, event(99, "error", 1), progress(40, 5, 2, step=10)]
    assert parts_of(events) == {"startup": 20, "down": 10, "productive": 10}


def test_an_empty_journal_has_no_time() -> None:
    account = make_account([])
    assert (account.total_us, account.parts_us, account.goodput) == (0, {}, None)


NAMES = ("start", "resume", "init", "ready", "progress", "saved", "bad_step", "roll_back")
SECONDS = st.floats(-1, 1e4) | st.just(float("nan")) | st.none()
STEPS = st.integers(-3, 40) | st.none()


@st.composite
def journals(draw: st.DrawFn) -> list[Event]:
    """Records in any order, with clocks that jump and fields that are missing."""
    events, now, attempt = [], 0.0, 1
    for _ in range(draw(st.integers(0, 25))):
        now += draw(st.floats(-5, 500))
        attempt += draw(st.sampled_from([0, 0, 0, 1]))
        name = draw(st.sampled_from([*NAMES, "hang", "stop", "finish", "error", "fault"]))
        named = draw(
            st.dictionaries(st.sampled_from(["step", "data", "save", "odd"]), SECONDS, max_size=3)
        )
        more = {
            "seconds": named if name == "progress" else draw(SECONDS),
            "from_step": draw(STEPS),
            "to_step": draw(STEPS),
            "decision": draw(st.sampled_from(["rerun", "skip", "roll_back"])),
            "previous_alive": draw(st.none() | st.floats(T0 - 10, T0 + 9999)),
        }
        events.append(event(now, name, attempt, draw(STEPS), **more))
    return events


@given(journals(), st.none() | st.floats(T0, T0 + 1e5), st.booleans())
def test_parts_add_up_to_the_wall_time_whatever_was_written(
    events: list[Event], alive: float | None, is_running: bool
) -> None:
    account = make_account(events, alive=alive, is_running=is_running)
    assert sum(account.parts_us.values()) == account.total_us >= 0
    assert all(us > 0 for us in account.parts_us.values())
    starts = [e for e in events if e["event"] == "start"]
    assert len(account.attempts) >= bool(starts)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=9))
def test_productive_time_is_that_of_the_steps_reached(runs: list[tuple[int, int]]) -> None:
    """Each attempt trains `steps` of one second, then goes `back` that many at the next start."""
    events: list[Event] = []
    now = at = reached = 0
    for attempt, (steps, back) in enumerate(runs, start=1):
        events += [event(now, "start", attempt), event(now, "resume", attempt, at)]
        now, at = now + steps, at + steps
        events.append(progress(now, at, attempt, step=float(steps)))
        reached, at = at, max(at - back, 0)
    account = make_account(events)
    assert account.parts_us.get("productive", 0) == reached * 1_000_000
