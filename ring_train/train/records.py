"""Reading the records of a run that may be under way: torn lines are left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Series = dict[str, tuple[list[int], list[float]]]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a JSON-lines file, each with its step; none if there is no file."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def read_series(path: Path) -> Series:
    """Return {key: (steps, values)} of the numbers in a JSON-lines file of records."""
    series: Series = {}
    for record in read_records(path):
        step = record.pop("step")
        for key, value in record.items():
            if isinstance(value, int | float):
                steps, values = series.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    return series
