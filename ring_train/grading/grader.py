"""Comparison of answers with expected ones, in processes that may be killed.

No answer can stop or slow what asks: each has a limit of time and memory, all together one of time.
What a limit ends counts as wrong, and says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ring_train.grading.numbers import is_number

WORKER = Path(__file__).with_name("worker.py")
ANSWER_LIMIT_S = 5.0
"""Of CPU time; math-verify's own default by the clock."""
TOTAL_LIMIT_S = 240.0
"""Ranks that wait for the grades give up after ten minutes (NCCL's default)."""
MAX_CHARACTERS = 2000
"""Longer ones are not compared; parsing takes quadratic time."""
PAIRS_PER_WORKER = 64
"""Below that another process is not worth its second of start."""
MAX_WORKERS = 8
MAX_SHOWN, MAX_SHOWN_CHARACTERS = 5, 40
"""Answers named in a warning, and how much of each."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Grade:
    """Whether an answer is the expected one."""

    is_correct: bool
    failure: str | None = None
    """Why that could not be found out; it then counts as wrong."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What math-verify makes of an expected answer."""

    has_value: bool
    """Answers of the same value are right; without one only the same text is."""
    failure: str | None = None
    """Why nothing can be compared with it."""


class Grader:
    """Compares answers with expected ones; `close` it, or use it in `with`.

    Works in any thread and beside any signal handler. Processes start when they are needed.

    Args:
        answer_limit_s: for one comparison, CPU time.
        total_limit_s: for one call of `grade`, by the clock.
    """

    def __init__(
        self, *, answer_limit_s: float = ANSWER_LIMIT_S, total_limit_s: float = TOTAL_LIMIT_S
    ) -> None:
        self.answer_limit_s, self.total_limit_s = answer_limit_s, total_limit_s
        self._too_late = f"not compared within {total_limit_s:g} s for all answers"
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.stop()

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        r"""Return a grade of each (expected answer, content of the \boxed{} that was found).

        The same text is right, and no number is wrong where one is expected; math-verify, with its
        limits, decides the others.
        """
        grades = {pair: _grade_at_once(*pair) for pair in pairs}
        open_pairs = [pair for pair, grade in grades.items() if grade is None]
        replies = self._ask([{"expected": gold, "boxed": boxed} for gold, boxed in open_pairs])
        compared = {
            pair: Grade(is_correct=reply.get("correct", False), failure=reply.get("failure"))
            for pair, reply in zip(open_pairs, replies, strict=True)
        }
        result = [grades[pair] or compared[pair] for pair in pairs]
        self._warn_of_uncompared(pairs, result)
        return result

    def _warn_of_uncompared(
        self, pairs: Sequence[tuple[str, str]], grades: Sequence[Grade]
    ) -> None:
        boxes = [
            boxed
            for (_, boxed), grade in zip(pairs, grades, strict=True)
            if grade.failure == self._too_late
        ]
        if boxes:
            logger.warning(
                "%d of %d answers were %s and count as wrong, so the accuracy is too low: %s",
                len(boxes),
                len(pairs),
                self._too_late,
                ", ".join(repr(boxed[:MAX_SHOWN_CHARACTERS]) for boxed in boxes[:MAX_SHOWN])
                + ("" if len(boxes) <= MAX_SHOWN else ", ..."),
            )

    def check_expected(self, expected: Sequence[str]) -> list[Expected]:
        """Return what can be compared with each expected answer."""
        replies = self._ask([{"expected": gold, "boxed": None} for gold in expected])
        return [
            Expected(has_value=reply.get("values", 0) > 0, failure=reply.get("failure"))
            for reply in replies
        ]

    def _ask(self, requests: list[dict[str, str | None]]) -> list[dict[str, Any]]:
        """Return the reply to each request; equal ones are answered once."""
        lines = [json.dumps(request) for request in requests]
        waiting = [
            line
            for line, request in dict(zip(lines, requests, strict=True)).items()
            if not _is_long(request)
        ]
        count = min(MAX_WORKERS, -(-len(waiting) // PAIRS_PER_WORKER))
        while len(self._workers) < count:
            self._workers.append(_Worker(self.answer_limit_s))
            self._idle.put(self._workers[-1])
        deadline = time.monotonic() + self.total_limit_s

        def reply_to(line: str) -> dict[str, Any]:
            if time.monotonic() > deadline:
                return {"failure": self._too_late}
            worker = self._idle.get()
            try:
                return worker.ask(line)
            finally:
                self._idle.put(worker)

        with ThreadPoolExecutor(max(count, 1)) as threads:
            replies = dict(zip(waiting, threads.map(reply_to, waiting), strict=True))
        too_long = {"failure": f"longer than {MAX_CHARACTERS} characters"}
        return [replies.get(line, too_long) for line in lines]


def _grade_at_once(expected: str, boxed: str) -> Grade | None:
    """Return the grade that needs no computation, if there is one."""
    if expected.strip() == boxed.strip():
        return Grade(is_correct=True)
    if max(len(expected), len(boxed)) <= MAX_CHARACTERS and is_number(expected):
        return None if is_number(boxed) else Grade(is_correct=False)
    return None


def _is_long(request: dict[str, str | None]) -> bool:
    return any(len(text or "") > MAX_CHARACTERS for text in request.values())


class _Worker:
    """One process of `worker.py`, started again after each death."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._process: subprocess.Popen[str] | None = None

    def ask(self, line: str) -> dict[str, Any]:
        """Return the reply to a request. The process dies rather than keep this waiting."""
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            reply = process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if reply:
            return json.loads(reply)
        status = self.stop()
        if status == -signal.SIGPROF:
            return {"failure": f"took more than {self.limit_s:g} s of CPU time"}
        return {"failure": f"math-verify's process ended with status {status}"}

    def stop(self) -> int:
        """End the process, if there is one; return its status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        try:
            return process.wait(timeout=self.limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _start(self) -> subprocess.Popen[str]:
        # -P: the folder of the file is no place to import from.
        command = [sys.executable, "-P", str(WORKER), str(self.limit_s)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
