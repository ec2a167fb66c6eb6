"""Plain loops that run interpreted when short and compiled, by numba, when long.

Both ways compute the same integers. Importing numba takes a second, so short loops avoid it.
"""

import functools
from collections.abc import Callable
from typing import Any


def quick[**P, R](function: Callable[P, R], steps: int, limit: int) -> Callable[..., Any]:
    """Return `function` itself for up to `limit` steps, else its compiled form."""
    return function if steps <= limit else _compiled(function)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import numba

    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # no folder to keep the compiled code in
        return numba.njit(function)
