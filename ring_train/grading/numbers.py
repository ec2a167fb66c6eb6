r"""Which answers are numbers, as they are written.

math-verify computes: `25+25` and `49 = 50` are 50 to it. Where a number is expected, an answer has
to be one.
"""

import re

SEPARATORS = re.compile(r"(?<=\d)(?:\{,\}|\\[,!]|,)(?=\d{3}(?!\d))")
"""Between thousands."""
WRAPPING = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
_REPEATING = r"\d*\.\d*\\overline\s*\{\d+\}"
_OVER = rf"(?:\{{\s*[+-]?\s*{_DECIMAL}\s*\}}|\s*\d)"
_FRACTION = rf"\\[dt]?frac\s*{_OVER}\s*{_OVER}"
_POWER_OF_TEN = r"\s*\\(?:times|cdot)\s*10\s*\^\s*(?:\d|\{\s*[+-]?\d+\s*\})"
_VALUE = (
    rf"(?:{_REPEATING}|(?:\d+\s*)?{_FRACTION}|{_DECIMAL}\s*/\s*{_DECIMAL}"
    rf"|{_DECIMAL}(?:[eE][+-]?\d+|{_POWER_OF_TEN})?)"
)
_UNIT = (
    r"(?:[A-Za-z]\s*\^\s*(?:\d|\{\s*-?\d\s*\})|\^\s*(?:\\circ|\{\s*\\circ\s*\})"
    r"|\\(?:[%$,;:! ]|circ|degree|quad)|[A-Za-z\s./%$])*"
)
_NAME = r"(?:[A-Za-z]\s*=\s*)?"
NUMBER = re.compile(rf"\s*{_NAME}\\?\$?\s*[+-]?\s*\\?\$?\s*{_VALUE}{_UNIT}")


def is_number(text: str) -> bool:
    r"""Return whether a text is one number: sign, decimal, fraction, power of ten, unit, percent.

    A letter that is said to be the number may stand before it: `x = 5`. `\frac{100}{2}` is a number
    as `\frac{1}{2}` is; `2^2` and `\sqrt{4}` are not.
    """
    bare = WRAPPING.sub(r" \1 ", SEPARATORS.sub("", text))
    return NUMBER.fullmatch(bare) is not None
