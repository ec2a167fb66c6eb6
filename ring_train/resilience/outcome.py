"""outcome.json: how the last start of a run ended, for scripts and people."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from enum import StrEnum, auto
from pathlib import Path

OUTCOME_FILE = "outcome.json"


class State(StrEnum):
    """Where a run stands."""

    running = auto()
    """Or dead without a word: see run.lock."""
    finished = auto()
    """It did what its config says."""
    stopped = auto()
    """By a signal or the deadline; starting it again goes on."""
    failed = auto()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One start of a run."""

    state: State
    step: int | None
    """Completed steps that are saved; None before training began."""
    num_steps: int
    reason: str
    attempt: int
    job_id: str | None


def write_outcome(run_dir: Path, outcome: Outcome) -> None:
    """Replace outcome.json, whole or not at all."""
    partial = run_dir / f"{OUTCOME_FILE}.partial"
    partial.write_text(json.dumps({**asdict(outcome), "time": round(time.time(), 3)}) + "\n")
    partial.replace(run_dir / OUTCOME_FILE)


def read_outcome(run_dir: Path) -> Outcome | None:
    """Return how the last start ended; None if there was none, or the file is torn."""
    try:
        record = json.loads((run_dir / OUTCOME_FILE).read_text())
        del record["time"]
        record["state"] = State(record["state"])
        return Outcome(**record)
    except (OSError, ValueError, TypeError, KeyError):
        return None
