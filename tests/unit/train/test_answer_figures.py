"""Accuracy is the mean over samples, entropy the mean over tokens, each per domain and overall."""

import json
import math

import pytest

import ring_train.platform  # noqa: F401  (before the first import of megatron-core)
from ring_train.train.answer_figures import GradedAnswer, answer_figures, figures_line


def answer(domain: str, name: str, sample: int = 0, **changes: object) -> GradedAnswer:
    values: dict[str, object] = {
        "prompt": "1 + 1?",
        "text": r"\boxed{2}",
        "expected": "2",
        "boxed": "2",
        "is_correct": False,
        "is_finished": True,
        "failure": None,
        "num_tokens": 10,
        "entropy_nats": 0.5,
    }
    return GradedAnswer(domain=domain, id=name, sample=sample, **(values | changes))  # pyrefly: ignore[bad-argument-type]


ANSWERS = [
    answer("math", "a", 0, is_correct=True, num_tokens=30, entropy_nats=0.1),
    answer("math", "a", 1, is_correct=True),
    answer("math", "b", 0, is_correct=True, is_finished=False),
    answer("math", "b", 1, failure="took more than 5 s of CPU time"),
    answer("code", "c", 0),
    answer("code", "c", 1),
]


def test_figures_of_each_domain_and_overall() -> None:
    figures = answer_figures(ANSWERS, num_samples=2)
    assert figures["accuracy"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert figures["accuracy/math"] == 0.75
    assert figures["accuracy/code"] == 0.0
    # Of the shares 1, 0.5, 0 and 1, 0.5: their standard deviation over the root of their number.
    assert figures["accuracy_standard_error"] == pytest.approx(0.5 / math.sqrt(3))
    assert figures["accuracy_standard_error/math"] == pytest.approx(0.25)
    assert "accuracy_standard_error/code" not in figures
    assert figures["entropy_nats"] == pytest.approx((30 * 0.1 + 50 * 0.5) / 80)
    assert figures["entropy_nats/code"] == 0.5
    assert figures["length_tokens"] == pytest.approx(80 / 6)
    assert figures["length_tokens/math"] == 15
    assert figures["unfinished_fraction"] == pytest.approx(1 / 6)
    assert figures["num_problems"] == 3
    assert figures["num_problems/math"] == 2
    assert figures["grader_failures"] == figures["grader_failures/math"] == 1
    assert figures["grader_failures/code"] == 0
    json.dumps(figures, allow_nan=False)


def test_the_line_of_the_console_says_what_failed() -> None:
    figures = answer_figures(ANSWERS, num_samples=2)
    line = figures_line(figures)
    assert line.startswith("accuracy 0.5000  accuracy/math 0.7500  accuracy/code 0.0000  entropy")
    assert line.endswith("grader_failures 1")
    assert "failures" not in figures_line(figures | {"grader_failures": 0})


def test_records_hold_text_and_verdict() -> None:
    record = ANSWERS[3].record()
    assert record["failure"].startswith("took")
    assert (record["domain"], record["id"], record["sample"]) == ("math", "b", 1)
    assert (record["correct"], record["expected"], record["boxed"]) == (False, "2", "2")
    assert (record["length_tokens"], record["entropy_nats"]) == (10, 0.5)
    assert record["text"] == r"\boxed{2}"
