r"""The process that runs math-verify: a request a line on stdin, a reply a line on stdout.

Run as a file: it imports nothing of ours. sympy may compute 9^{9^{9^{9}}} for hours or fill the
memory, and math-verify's own limit is a signal handler, which works in the main thread alone and
only between two steps of the interpreter. So this process has a limit of memory, and a timer
without a handler: the kernel ends it, and `Grader` starts another. The timer counts CPU time, so
that the load of a machine changes no grade.

A request is {"expected": str, "boxed": str | null}; null asks how many values
math-verify finds in `expected`. The reply is {"correct": bool}, {"values": int} or
{"failure": str}.
"""

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

START_LIMIT_S = 120.0
"""For the import of sympy, perhaps from a slow file system."""
MEMORY_LIMIT_BYTES = 2 * 2**30
"""Of address space; sympy alone takes 0.3 GiB."""


def main(limit_s: float) -> None:
    """Answer requests until stdin ends.

    Args:
        limit_s: for one request; CPU time; past it the process dies of SIGPROF.
    """
    signal.setitimer(signal.ITIMER_REAL, START_LIMIT_S)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    from math_verify import parse, verify  # noqa: F401  (in memory before the first request)

    for stream in (sys.stdout, sys.stderr):  # parsers print
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    logging.disable(logging.CRITICAL)
    signal.setitimer(signal.ITIMER_REAL, 0)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        reply = answer(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def answer(request: dict[str, str | None]) -> dict[str, Any]:
    """Return the reply to a request."""
    from math_verify import verify

    try:
        expected = understood(request["expected"] or "")
        if request["boxed"] is None:
            return {"values": len([x for x in expected if not isinstance(x, str)])}
        found = understood(request["boxed"])
        same = verify(expected, found, timeout_seconds=0, raise_on_error=True)
        return {"correct": bool(same)}
    except Exception as error:  # a grader must not stop what it grades
        return {"failure": f"{type(error).__name__}: {error}"[:200]}


def understood(boxed: str) -> list[Any]:
    """Return what math-verify makes of the content of a box, LaTeX or plain; [] = nothing."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    text = f"\\boxed{{{boxed}}}"
    return parse(text, extraction_config=targets, parsing_timeout=0, raise_on_error=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
