"""Answers are compared by value, and none can hang, crash or fill the memory of what asks."""

import os
import resource
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from ring_train.grading import Grade, Grader
from ring_train.grading.grader import MAX_CHARACTERS

LIMIT_S = 1.0
SLACK_S = 20.0
"""For the start of processes on a loaded machine."""
HANGS = r"9^{9^{9^{9}}}"


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


@pytest.fixture(scope="module")
def hurried() -> Iterator[Grader]:
    with Grader(answer_limit_s=LIMIT_S) as grader:
        yield grader


@pytest.mark.parametrize(
    ("expected", "boxed", "is_correct"),
    [
        ("120", "120", True),
        ("120", "121", False),
        ("1/2", r"\frac{1}{2}", True),
        (r"\frac{1}{2}", "0.5", True),
        ("1234", "1,234", True),
        ("5", "x = 5", True),
        ("y + 5", "x = y + 5", True),
        ("50", "66+24-40", False),
        ("50", "49 = 50", False),
        ("50", r"\frac{100}{2}", True),
        ("50", "100/2", True),
        ("50", r"\sqrt{2500}", False),
        ("2500", "50^2", False),
        ("50", r"50 \text{ cm}^2", True),
        ("1234567", "1,234,567", True),
        ("25+25", "50", True),
        (r"$\sqrt{8}$", r"2\sqrt{2}", True),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("(x+1)^2", "x^2 + 2x + 1", True),
        ("-3", "3", False),
        ("7", "{", False),
        ("7", "}{", False),
        ("7", r"\frac{", False),
        ("7", r"\text{seven}", False),
    ],
)
def test_values_are_compared(grader: Grader, expected: str, boxed: str, is_correct: bool) -> None:
    assert grader.grade([(expected, boxed)]) == [Grade(is_correct=is_correct)]


def test_a_comparison_that_hangs_is_ended_and_the_others_go_on(hurried: Grader) -> None:
    started = time.monotonic()
    pairs = [(r"\sqrt{9}", HANGS), ("3", "3.0"), (r"\sqrt{9}", r"(10^{9})!"), ("4", "4.0")]
    grades = hurried.grade(pairs)
    assert [grade.is_correct for grade in grades] == [False, True, False, True]
    assert [grade.failure is not None for grade in grades] == [True, False, True, False]
    assert grades[0].failure == "took more than 1 s of CPU time"
    assert time.monotonic() - started < 4 * LIMIT_S + SLACK_S


@pytest.mark.parametrize("boxed", ["7" * 100_000, "{" * 100_000, "1+" * MAX_CHARACTERS])
def test_a_very_long_answer_is_not_compared(grader: Grader, boxed: str) -> None:
    started = time.monotonic()
    (grade,) = grader.grade([("7", boxed)])
    assert grade == Grade(is_correct=False, failure=f"longer than {MAX_CHARACTERS} characters")
    assert time.monotonic() - started < SLACK_S


def test_a_process_that_is_killed_is_replaced(grader: Grader) -> None:
    grader.grade([("1", "1.0")])
    process = grader._workers[0]._process
    assert process is not None
    process.kill()
    process.wait()
    (grade,) = grader.grade([("2", "2.0")])
    assert grade.failure == f"math-verify's process ended with status -{int(signal.SIGKILL)}"
    assert grader.grade([("2", "2.0")]) == [Grade(is_correct=True)]


def test_the_memory_of_a_process_is_bounded(grader: Grader) -> None:
    grader.grade([("1", "1.0")])
    process = grader._workers[0]._process
    assert process is not None
    assert resource.prlimit(process.pid, resource.RLIMIT_AS)[0] == 2 * 2**30


def test_the_time_for_all_answers_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    pairs = [(f"x + {n}", HANGS) for n in range(30)]
    started = time.monotonic()
    with Grader(answer_limit_s=LIMIT_S, total_limit_s=2 * LIMIT_S) as grader:
        grades = grader.grade(pairs)
    assert time.monotonic() - started < 4 * LIMIT_S + SLACK_S
    assert {grade.failure for grade in grades} == {
        "took more than 1 s of CPU time",
        "not compared within 2 s for all answers",
    }
    late = sum(grade.failure == "not compared within 2 s for all answers" for grade in grades)
    (record,) = caplog.records
    assert f"{late} of 30 answers were not compared within 2 s" in record.message
    assert record.message.count(HANGS) == 5


def test_the_same_text_is_right_without_time() -> None:
    with Grader(total_limit_s=-1) as grader:
        same, value = grader.grade([("50 ", "50"), ("50", "50.0")])
        assert not grader._workers or grader._workers[0]._process is None
    assert same == Grade(is_correct=True)
    assert not value.is_correct
    assert value.failure is not None


def test_it_works_in_a_thread_and_leaves_signal_handlers_alone(grader: Grader) -> None:
    before = signal.getsignal(signal.SIGALRM)
    results: list[Grade] = []
    thread = threading.Thread(target=lambda: results.extend(grader.grade([("6", "6.0")])))
    thread.start()
    thread.join()
    assert results == [Grade(is_correct=True)]
    assert signal.getsignal(signal.SIGALRM) is before


def test_many_answers_are_shared_by_processes_and_come_in_order() -> None:
    pairs = [(str(n), f"{n + n % 2}.0") for n in range(100)]
    with Grader() as grader:
        grades = grader.grade(pairs)
        pids = [worker._process.pid for worker in grader._workers if worker._process]
    assert [grade.is_correct for grade in grades] == [n % 2 == 0 for n in range(100)]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError, match="No such process"):
            os.kill(pid, 0)


def test_expected_answers_without_a_value_are_told(grader: Grader) -> None:
    found = grader.check_expected(["12", "!!!", r"\frac{1}{2}", "x" * (MAX_CHARACTERS + 1)])
    assert [item.has_value for item in found] == [True, False, True, False]
    too_long = f"longer than {MAX_CHARACTERS} characters"
    assert [item.failure for item in found] == [None, None, None, too_long]
    assert grader.check_expected([]) == []
    same, other = grader.grade([("!!!", "!!!"), ("!!!", "12")])
    assert (same.is_correct, other.is_correct) == (True, False)
