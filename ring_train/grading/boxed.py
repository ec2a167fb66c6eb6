r"""Where the result of an answer is: the last \boxed{} after the reasoning.

Both functions take linear time, whatever the text.
"""

import re

THINK, THINK_END = "<think>", "</think>"
BOX = re.compile(r"\\boxed\s*\{")


def after_thinking(text: str, *, is_thinking: bool) -> str | None:
    """Return what follows the reasoning, or None if reasoning was begun and not ended.

    Args:
        text: what the model wrote.
        is_thinking: the prompt has begun the reasoning.
    """
    end = text.rfind(THINK_END)
    begin = text.rfind(THINK)
    if begin > end or (end < 0 and is_thinking):
        return None
    return text if end < 0 else text[end + len(THINK_END) :]


def last_boxed(text: str) -> str | None:
    r"""Return what is in the last \boxed{}; None if there is none, or it is empty or not closed."""
    start = None
    for start in BOX.finditer(text):  # noqa: B007  # the last one is wanted
        pass
    if start is None:
        return None
    depth = 1
    position = start.end()
    while position < len(text):
        character = text[position]
        if character == "\\":  # it and what it escapes
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start.end() : position].strip() or None
        position += 1
    return None
