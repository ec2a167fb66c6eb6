"""Pictures of time and of slow ranks are drawn from what a run has, however little."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ring_train.train.time_plots import read_step_seconds, write_goodput, write_stragglers

PNG = b"\x89PNG\r\n"


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def journal(*events: tuple[float, str, int, int | None]) -> list[dict[str, Any]]:
    return [
        {"time": 1e9 + t, "event": name, "attempt": attempt, "rank": 0, "step": step}
        for t, name, attempt, step in events
    ]


@pytest.mark.parametrize("long", [False, True])
def test_goodput_is_drawn_from_a_journal(long: bool, tmp_path: Path) -> None:
    events = journal((0, "start", 1, None), (1, "init", 1, 0))
    if long:
        events += journal((2, "progress", 1, 5), (90000, "start", 2, None), (90009, "resume", 2, 3))
    write(tmp_path / "journal.jsonl", events)
    path = write_goodput(tmp_path, "a run")
    assert path is not None
    assert path.read_bytes().startswith(PNG)


def test_an_empty_journal_is_not_drawn(tmp_path: Path) -> None:
    assert write_goodput(tmp_path, "a run") is None
    (tmp_path / "journal.jsonl").write_text('{"ev')
    assert write_goodput(tmp_path, "a run") is None


def test_step_seconds_are_those_of_the_newest_number_of_ranks(tmp_path: Path) -> None:
    path = tmp_path / "stragglers.jsonl"
    rows = [[1, 1, 1, 1], [1, 2], [3, None]]
    write(path, [{"step": i, "step_s": row} for i, row in enumerate(rows, start=1)])
    found = read_step_seconds(path)
    assert found is not None
    steps, seconds = found
    assert steps.tolist() == [2, 3]
    np.testing.assert_equal(seconds, [[1, 2], [3, np.nan]])


@pytest.mark.parametrize("records", [1, 700])
def test_slow_ranks_are_drawn(records: int, tmp_path: Path) -> None:
    rows = [{"step": i, "step_s": [1.0, 1.2, None, 1.1]} for i in range(1, records + 1)]
    write(tmp_path / "stragglers.jsonl", rows)
    path = write_stragglers(tmp_path, "a run")
    assert path is not None
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize("row", [[1.0], [None, None], []])
def test_one_rank_or_none_measured_is_not_drawn(row: list[float | None], tmp_path: Path) -> None:
    write(tmp_path / "stragglers.jsonl", [{"step": 1, "step_s": row}])
    assert write_stragglers(tmp_path, "a run") is None
