"""Whether a generated answer is right: its boxed result, compared by math-verify.

Imports neither torch nor anything of ours but errors, so whatever grades can use it.
"""

from ring_train.grading.boxed import after_thinking, last_boxed
from ring_train.grading.grader import Expected, Grade, Grader

__all__ = ["Expected", "Grade", "Grader", "after_thinking", "last_boxed"]
