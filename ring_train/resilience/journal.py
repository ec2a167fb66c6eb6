"""journal.jsonl: everything that happened to a run, one JSON object a line, never shortened.

Every line has `time` (Unix seconds), `event`, `attempt` (starts of the run, from 1), `rank` and
`step` (completed steps, or the number of the step that is meant; null if neither). Rank 0 tells
what all ranks agree on; other ranks tell only what happened to them alone. The events and their
fields are listed in docs/resilience.md.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from ring_train.storage.lines import PatientLines

logger = logging.getLogger(__name__)

JOURNAL_FILE = "journal.jsonl"
START = "start"
ROLL_BACK = "roll_back"
ROLLED_BACK = "rolled_back"
BAD_STEP = "bad_step"


class Journal:
    """The journal of one start of a run, as one rank writes it.

    Args:
        run_dir: the run folder.
        attempt: which start this is.
        rank: global rank.
        lines: shared with the other records of the run, so that one disk is judged as a whole.
    """

    def __init__(
        self, run_dir: Path, *, attempt: int, rank: int, lines: PatientLines | None = None
    ) -> None:
        self.path = run_dir / JOURNAL_FILE
        self.attempt, self.rank = attempt, rank
        self.lines = lines or PatientLines()

    def write(self, event: str, *, step: int | None = None, **fields: Any) -> None:
        """Append an event, durably: what is decided after it may rely on it."""
        record = {
            "time": round(time.time(), 3),
            "event": event,
            "attempt": self.attempt,
            "rank": self.rank,
            "step": step,
            **fields,
        }
        self.lines.append(self.path, json.dumps(record) + "\n", durable=True)


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    """Return the events of a run in order; lines that a failing disk tore are left out."""
    path = run_dir / JOURNAL_FILE
    if not path.exists():
        return []
    events = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s: a torn line is left out", path)
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    return events


def next_attempt(events: list[dict[str, Any]]) -> int:
    """Return the number of the start that follows these events."""
    return sum(event["event"] == START for event in events) + 1


def skipped_steps(events: list[dict[str, Any]]) -> set[int]:
    """Return the numbers of the steps that a run decided to pass over, whenever it did.

    A decision holds for every later start, so that a run that is resumed is the run it was.
    """
    skipped: set[int] = set()
    for event in events:
        if event["event"] == BAD_STEP and event.get("decision") == "skip":
            skipped.add(event["step"])
        elif event["event"] == ROLL_BACK:
            first, last = event["skipped"]
            skipped |= set(range(first, last + 1))
    return skipped
