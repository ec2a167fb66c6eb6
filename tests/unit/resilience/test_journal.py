"""The journal keeps what was decided, whatever became of the disk or the process."""

import json
from pathlib import Path

from ring_train.resilience.journal import (
    JOURNAL_FILE,
    Journal,
    next_attempt,
    read_journal,
    skipped_steps,
)


def test_events_say_when_who_and_which_start(tmp_path: Path) -> None:
    Journal(tmp_path, attempt=1, rank=0).write("start", world_size=2)
    Journal(tmp_path, attempt=1, rank=1).write("hang", step=7, phase="forward")
    start, hang = read_journal(tmp_path)
    assert start.keys() == {"time", "event", "attempt", "rank", "step", "world_size"}
    assert (start["event"], start["step"]) == ("start", None)
    assert (hang["event"], hang["rank"], hang["step"], hang["phase"]) == ("hang", 1, 7, "forward")
    assert start["time"] <= hang["time"]


def test_torn_lines_are_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path, attempt=1, rank=0)
    journal.write("start")
    with (tmp_path / JOURNAL_FILE).open("ab") as file:
        file.write(b'{"event": "sa\xff\n[1]\n"text"\n')
    journal.write("finish", step=3)
    assert [event["event"] for event in read_journal(tmp_path)] == ["start", "finish"]


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    assert read_journal(tmp_path) == []
    assert next_attempt([]) == 1


def test_starts_are_counted(tmp_path: Path) -> None:
    for attempt in (1, 2):
        Journal(tmp_path, attempt=attempt, rank=0).write("start")
        Journal(tmp_path, attempt=attempt, rank=1).write("error", message="away")
    assert next_attempt(read_journal(tmp_path)) == 3


def test_decisions_hold_for_later_starts() -> None:
    events = [
        {"event": "bad_step", "step": 4, "decision": "rerun"},
        {"event": "bad_step", "step": 5, "decision": "skip"},
        {"event": "bad_step", "step": 9, "decision": "roll_back"},
        {"event": "roll_back", "step": 9, "skipped": [7, 9]},
    ]
    assert skipped_steps(events) == {5, 7, 8, 9}


def test_the_journal_is_json_that_others_read(tmp_path: Path) -> None:
    Journal(tmp_path, attempt=1, rank=0).write("bad_step", step=1, lm_loss="nan")
    line = (tmp_path / JOURNAL_FILE).read_text()
    json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))
