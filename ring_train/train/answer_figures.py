"""Figures of graded answers, per domain and overall."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GradedAnswer:
    """One answer to one problem."""

    domain: str
    id: str
    sample: int
    """0-based, of the answers to this problem."""
    prompt: str
    text: str
    """What was generated, without the stop token."""
    expected: str
    boxed: str | None
    """What was compared with it; None = no result, which is wrong."""
    is_correct: bool
    is_finished: bool
    """Ended by itself, and with its reasoning closed."""
    failure: str | None
    """Why the grader could not compare; None = it could."""
    num_tokens: int
    """Generated, the stop token included."""
    entropy_nats: float
    """Mean over these tokens."""

    def record(self) -> dict[str, Any]:
        """Return the line of an answers file."""
        return {
            "domain": self.domain,
            "id": self.id,
            "sample": self.sample,
            "correct": self.is_correct,
            "expected": self.expected,
            "boxed": self.boxed,
            "finished": self.is_finished,
            "failure": self.failure,
            "length_tokens": self.num_tokens,
            "entropy_nats": finite_or_none(self.entropy_nats),
            "prompt": self.prompt,
            "text": self.text,
        }


def finite_or_none(value: float) -> float | None:
    """Return a value that JSON can hold: NaN and infinities are none."""
    return value if math.isfinite(value) else None


def answer_figures(answers: Sequence[GradedAnswer], num_samples: int) -> dict[str, float]:
    """Return the figures of all answers, and with "/<domain>" those of each domain.

    Args:
        answers: those to one problem lie together.
        num_samples: answers to each problem.
    """
    figures = _figures(answers, num_samples)
    for domain in dict.fromkeys(answer.domain for answer in answers):
        of_domain = [answer for answer in answers if answer.domain == domain]
        figures |= {
            f"{key}/{domain}": value for key, value in _figures(of_domain, num_samples).items()
        }
    return figures


def figures_line(figures: Mapping[str, float]) -> str:
    """Return accuracy by domain and entropy, for the console."""
    domains = [key for key in figures if key.startswith("accuracy/")]
    parts = [f"{key} {figures[key]:.4f}" for key in ("accuracy", *domains, "entropy_nats")]
    failures = figures["grader_failures"]
    return "  ".join(parts) + (f"  grader_failures {failures:.0f}" if failures else "")


def _figures(answers: Sequence[GradedAnswer], num_samples: int) -> dict[str, float]:
    correct = [answer.is_correct for answer in answers]
    shares = [
        statistics.fmean(correct[start : start + num_samples])
        for start in range(0, len(correct), num_samples)
    ]
    tokens = sum(answer.num_tokens for answer in answers)
    entropy = math.fsum(answer.entropy_nats * answer.num_tokens for answer in answers)
    figures = {"accuracy": statistics.fmean(shares)}
    if len(shares) > 1:  # of one problem nothing can be said
        figures["accuracy_standard_error"] = statistics.stdev(shares) / math.sqrt(len(shares))
    return figures | {
        "entropy_nats": entropy / tokens,
        "length_tokens": tokens / len(answers),
        "unfinished_fraction": sum(not answer.is_finished for answer in answers) / len(answers),
        "num_problems": len(shares),
        "grader_failures": sum(answer.failure is not None for answer in answers),
    }
