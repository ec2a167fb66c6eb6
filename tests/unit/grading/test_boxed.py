"""Which part of an answer is its result."""

import time

import pytest

from ring_train.grading import after_thinking, last_boxed

LONG = 100_000
LINEAR_S = 1.0
"""A hundred times what a linear scan of LONG characters takes; a quadratic one takes minutes."""


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{120}.", "120"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} holds", r"\frac{1}{2}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{a \\ {b}}", r"a \\ {b}"),
        ("\\boxed{1 +\n2}", "1 +\n2"),
        ("120", None),
        (r"\boxed{}", None),
        (r"\boxed{  }", None),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed{1\}", None),
        (r"\boxed 5", None),
        ("", None),
    ],
)
def test_the_last_box_counts(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("text", "is_thinking", "rest"),
    [
        ("<think>\n1\n</think>\n2", False, "\n2"),
        ("1\n</think>\n2", True, "\n2"),
        ("1", True, None),
        ("<think>\n1", False, None),
        ("<think>1</think>2<think>3", False, None),
        ("<think>1</think>2<think>3</think>4", False, "4"),
        ("1", False, "1"),
        ("", True, None),
    ],
)
def test_reasoning_is_left_out(text: str, is_thinking: bool, rest: str | None) -> None:
    assert after_thinking(text, is_thinking=is_thinking) == rest


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * LONG,
        r"\boxed{" + "{" * LONG,
        r"\boxed" + " " * LONG,
        r"\boxed " * LONG,
        "\\" * LONG,
        r"\boxed{" + "\\" * LONG,
        "<think>" * LONG,
    ],
)
def test_hostile_text_takes_linear_time(text: str) -> None:
    started = time.perf_counter()
    assert last_boxed(text) is None
    after_thinking(text, is_thinking=False)
    assert time.perf_counter() - started < LINEAR_S
