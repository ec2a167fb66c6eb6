"""Reading the records of a run that may be under way: the ends of files, torn lines left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ring_train.errors import UserError
from ring_train.resilience.journal import JOURNAL_FILE, read_journal
from ring_train.resilience.run_lock import LOCK_FILE

TAIL_BYTES = 2**20
"""Of a file of records are read; the last hundreds of them."""


def read_tail(path: Path, max_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """Return the last records of a file of JSON lines; none where there is no file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, 2) - max_bytes, 0))
            lines = file.read().split(b"\n")  # the first may lack its beginning, like a torn one
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); check its permissions"
        ) from None
    records = (_parsed(line) for line in lines)
    return [record for record in records if "step" in record]


def _parsed(line: bytes) -> dict[str, Any]:
    """Return the record of a line; empty for one that is torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def read_record(path: Path) -> Mapping[str, Any]:
    """Return a JSON object of a file; empty where it is missing or torn."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return {}


def check_run_folder(run_dir: Path) -> None:
    """Raise a UserError unless the folder is a run's."""
    key = f"run_dir={run_dir}"
    if not run_dir.is_dir():
        raise UserError(f"{key} is not a folder; name the run_dir of a run")
    if run_dir.parent.name == "checkpoints":
        raise UserError(f"{key} is a checkpoint; name its run folder, {run_dir.parent.parent}")
    if not any((run_dir / name).exists() for name in (JOURNAL_FILE, "config.yaml", LOCK_FILE)):
        raise UserError(
            f"{key} is not a run folder: it has neither {JOURNAL_FILE} nor config.yaml; "
            "name the run_dir of a run"
        )


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Return the journal of a run, what is no record left out.

    Raises:
        UserError: the folder is not a run's, or nothing has been started in it.
    """
    check_run_folder(run_dir)
    try:
        events = [event for event in read_journal(run_dir) if _is_event(event)]
    except OSError as error:
        raise UserError(
            f"run_dir={run_dir}: {JOURNAL_FILE} cannot be read ({error.strerror}); check its "
            "permissions"
        ) from None
    if not events:
        raise UserError(
            f"run_dir={run_dir}: {JOURNAL_FILE} has no record, so nothing was started here, or by "
            "a version that kept no journal; start the run (again)"
        )
    return events


def _is_event(event: Mapping[str, Any]) -> bool:
    return isinstance(event.get("time"), int | float) and isinstance(event.get("attempt"), int)
