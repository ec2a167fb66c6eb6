"""Runs that meet random faults end, without a person, as runs that meet none.

CHAOS_SCHEDULES is their number: 20 unless set, 200 for `make chaos`, which also writes the table of
docs/chaos.md. CHAOS_SEEDS=3,14 repeats some.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ring_train.resilience.goodput import make_account
from ring_train.resilience.journal import read_journal, skipped_steps
from ring_train.resilience.outcome import State, read_outcome
from tests.chaos.conftest import QuietRun
from tests.chaos.schedules import (
    LAYOUT_TOLERANCE,
    LAYOUTS,
    NUM_STEPS,
    Schedule,
    make_schedule,
    seeds,
)
from tests.chaos.supervisor import Start, Story, run_once, run_to_the_end

COUNT = int(os.environ.get("CHAOS_SCHEDULES", "20"))
COLD = (3, 9, 16)
"""Seeds whose second start is one of new processes."""
RECORDS = ("metrics.jsonl", "validation.jsonl", "ledger.jsonl", "loads.jsonl")
RESULTS = os.environ.get("CHAOS_RESULTS")
"""File that receives a line of JSON for each schedule."""

pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize("seed", seeds(COUNT, os.environ.get("CHAOS_SEEDS")))
def test_a_run_under_faults_ends_as_promised(
    seed: int, words: list[str], quiet_run: QuietRun, warm: None, tmp_path: Path
) -> None:
    schedule = make_schedule(seed, cold=seed in COLD)
    run_dir, log = tmp_path / "run", tmp_path / "log"
    cpu_s = cpu_seconds()
    story = run_to_the_end(starts(schedule, words, run_dir, log))
    cpu_s = cpu_seconds() - cpu_s
    said = f"{schedule}\n{story.statuses}\n"
    survived = False
    try:
        assert story.succeeded, said + log.read_text()[-6000:]
        check_promise(schedule, words, quiet_run, run_dir, said)
        check_left(schedule, run_dir, story, said)
        survived = True
    finally:
        if RESULTS:
            write_result(Path(RESULTS), schedule, story, run_dir, survived=survived, cpu_s=cpu_s)


def starts(
    schedule: Schedule, words: list[str], run_dir: Path, log: Path
) -> Callable[[int], Start]:
    """Return how the run of a schedule is started the nth time."""
    num_ranks, layout = LAYOUTS[schedule.layout]

    def start(attempt: int) -> Start:
        fewer = schedule.fewer_from is not None and attempt >= schedule.fewer_from
        wanted = [] if fewer else layout
        return Start(
            [*words, *wanted, *schedule.words(), f"run_dir={run_dir}"],
            1 if fewer else num_ranks,
            log,
            cold=attempt == schedule.cold,
            on_start=lambda pids: send_later(pids, schedule.outside.get(attempt)),
        )

    return start


def send_later(pids: list[int], after_s: float | None) -> None:
    """Send all ranks SIGTERM in a while."""
    if after_s is None:
        return

    def send() -> None:
        time.sleep(after_s)
        for pid in pids:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue

    threading.Thread(target=send, daemon=True).start()


def check_promise(
    schedule: Schedule, words: list[str], quiet_run: QuietRun, run_dir: Path, said: str
) -> None:
    """Hold a run to what is promised of it."""
    quiet = quiet_run(schedule.layout)
    if schedule.fewer_from is not None:
        check_close(run_dir, quiet, said)
        return
    passed_over = sorted(skipped_steps(read_journal(run_dir)))
    if passed_over:
        assert schedule.comes_again, f"{said}steps {passed_over} were passed over"
        quiet = run_dir.with_name("told")
        num_ranks, layout = LAYOUTS[schedule.layout]
        told = f"resilience.skip_steps={passed_over}".replace(" ", "")
        log = run_dir.with_name("told.log")
        start = Start([*words, *layout, told, f"run_dir={quiet}"], num_ranks, log)
        assert run_once(start) == [0] * num_ranks, log.read_text()
    for name in RECORDS:
        assert (run_dir / name).read_bytes() == (quiet / name).read_bytes(), f"{said}{name}"
    assert tensor_digests(run_dir) == tensor_digests(quiet), f"{said}tensors differ"


def check_close(run_dir: Path, quiet: Path, said: str) -> None:
    """Compare the records of runs of different layouts."""
    ours, theirs = (records(folder / "metrics.jsonl") for folder in (run_dir, quiet))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs], said
    for record, expected in zip(ours, theirs, strict=True):
        close = pytest.approx(expected["lm_loss"], abs=LAYOUT_TOLERANCE)
        assert record["lm_loss"] == close, f"{said}step {record['step']}"
    ledgers = [records(folder / "ledger.jsonl")[-1] for folder in (run_dir, quiet)]
    assert ledgers[0] == ledgers[1], said


def check_left(schedule: Schedule, run_dir: Path, story: Story, said: str) -> None:
    """Check what a run leaves: no half of anything, and a journal that tells it all."""
    assert not [*run_dir.rglob("*.partial"), *run_dir.glob("run.lock*")], said
    outcome = read_outcome(run_dir)
    assert outcome is not None, said
    assert (outcome.state, outcome.step) == (State.finished, NUM_STEPS), said
    events = read_journal(run_dir)
    begun = max(event["attempt"] for event in events)
    assert begun <= story.num_attempts, said
    assert events[-1]["event"] == "finish", said
    told = {event["attempt"] for event in events if event["event"] == "fault"}
    assert set(range(1, begun)) <= told | schedule.outside.keys(), f"{said}an end without a cause"
    goodput = make_account(events)
    assert sum(goodput.parts_us.values()) == goodput.total_us, said
    assert goodput.parts_us["productive"] > 0, said


def tensor_digests(run_dir: Path) -> dict[str, str]:
    """Return the digest of every tensor that was saved last."""
    from tests.parallel.test_checkpoint_layouts import digests

    return digests(run_dir, NUM_STEPS)


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cpu_seconds() -> float:
    """Return what ranks that have ended used of the processors."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_result(
    path: Path, schedule: Schedule, story: Story, run_dir: Path, *, survived: bool, cpu_s: float
) -> None:
    """Append what struck, whether the promise was kept, and how long stops took."""
    events = read_journal(run_dir)
    struck = {
        (event["attempt"], event["step"], event["kind"], event["phase"])
        for event in events
        if event["event"] == "fault"
    }
    record = {
        "seed": schedule.seed,
        "schedule": str(schedule),
        "survived": survived,
        "statuses": story.statuses,
        "struck": sorted(fault[2:] for fault in struck),
        "stop_s": [event["seconds"] for event in events if event["event"] == "stop"],
        "decisions": [event["decision"] for event in events if event["event"] == "bad_step"],
        "cpu_s": round(cpu_s, 2),
    }
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")
