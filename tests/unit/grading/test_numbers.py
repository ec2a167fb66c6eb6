"""A number is told from what has to be computed first, whatever the text, in linear time."""

import time

import pytest

from ring_train.grading.grader import MAX_CHARACTERS
from ring_train.grading.numbers import is_number

LIMIT_S = 1.0
"""Of texts that would take quadratic time many times over."""


@pytest.mark.parametrize(
    "text",
    [
        *("50", "-50", "+ 50", "50.", ".5", "0.50", "1,234", "1{,}234.5", r"1\,234", "$50$"),
        *("x = 50", "y=-0.5"),
        *("1/2", "-1 / 2", r"\frac{1}{2}", r"-\dfrac12", r"\frac{100}{2}", r"1\frac{1}{2}"),
        *(r"50\%", "50 %", r"\$50", "-$50", "50 km/h", r"50\text{ m}^2", r"50^\circ", "50 apples"),
        *(r"1.5 \times 10^{3}", "1.5e3", r"0.\overline{3}", r"\text{50}", r"50\ \mathrm{cm}^{2}"),
    ],
)
def test_numbers(text: str) -> None:
    assert is_number(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "66+24-40", "49 = 50", "x = y = 50", "25 + 25", "25*2", "(50)", "50!", "50^2"),
        *(r"25 \times 2", r"\sqrt{2500}", r"\frac{50+50}{2}", "100/2/1", "50 or 49", "50, 49"),
        *("50 - 0", r"\boxed{50}", r"\frac{1}{2}+1", r"50 \cdot 1", "2^{10}", "1/2 = 0.5"),
    ],
)
def test_no_numbers(text: str) -> None:
    assert not is_number(text)


@pytest.mark.parametrize("part", ["7", "7,777", "a", "a ", "a^2", "\\text{", "\\frac", " ", "7."])
def test_long_texts_take_no_time(part: str) -> None:
    started = time.monotonic()
    is_number("7 " + part * (MAX_CHARACTERS // len(part)) + "=")
    assert time.monotonic() - started < LIMIT_S
