"""`status` says where a run stands from whatever its folder has, quickly and without torch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ring_train.errors import UserError
from ring_train.jobs.run_files import read_events, read_tail
from ring_train.jobs.run_status import read_status, slope_per_100_steps, straggler_ratios
from ring_train.jobs.status import aligned, duration, main, text_of

T0 = 1_700_000_000.0


def event(at: float, name: str, attempt: int = 1, step: int | None = None, **more: Any) -> Any:
    return {
        **{"time": T0 + at, "event": name, "attempt": attempt, "rank": 0, "step": step},
        **more,
    }


BEGIN = [event(0, "start", world_size=2, num_steps=100), event(5, "init"), event(10, "ready")]
HALF = [
    *BEGIN,
    event(30, "progress", step=20, tokens=2000, seconds={"step": 20}),
    event(60, "progress", step=50, tokens=5000, seconds={"step": 30}),
    event(60, "saved", step=50, seconds=1.5),
]


def write(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that is half done and alive at T0 + 70."""
    write(tmp_path / "journal.jsonl", HALF)
    (tmp_path / "plan.json").write_text(json.dumps({"total_tokens": 10000}))
    metrics = [
        {"step": s, "lm_loss": 5 - s / 100, "lm_loss/web": 4.0, "trained_tokens/web": 9}
        for s in range(10, 60, 10)
    ]
    write(tmp_path / "metrics.jsonl", metrics)
    write(tmp_path / "timing.jsonl", [{"step": 50, "step_s": 0.9, "tokens_per_s": 111.0}])
    write(tmp_path / "validation.jsonl", [{"step": 50, "valid_loss/web": 4.5}])
    write(tmp_path / "ledger.jsonl", [{"step": 50, "tokens": {"a": {"web": 3}, "b": {"web": 4}}}])
    write(tmp_path / "stragglers.jsonl", [{"step": 50, "step_s": [1.0, 1.0, 2.0]}])
    renew(tmp_path, 69)
    return tmp_path


def renew(run: Path, at: float) -> None:
    (run / "run.lock").write_text("{}")
    os.utime(run / "run.lock", (T0 + at, T0 + at))


def test_a_live_run_is_told_with_its_end(run: Path) -> None:
    status = read_status(run, T0 + 70)
    assert status.state == "running"
    assert (status.step, status.num_steps) == (50, 100)
    assert (status.tokens, status.total_tokens) == (5000, 10000)
    assert status.wall_s_per_step == 1.0
    assert status.ends_at == T0 + 60 + 50
    assert status.lm_loss == 4.5
    assert status.loss_per_100_steps == pytest.approx(-1)
    assert (status.checkpoint_step, status.checkpoint_at) == (50, T0 + 60)
    assert status.straggler_ratios == {2: 2.0}
    domain = status.domains["web"]
    assert (domain.loss, domain.validation_loss, domain.tokens) == (4.0, 4.5, 7)
    page = text_of(status)
    for words in ("50 of 100 (50.0%)", "rank 2 2.00 x", "in 40 s", "step 50, 10 s ago", "web "):
        assert words in page, page


def test_a_run_that_saves_its_last_step_is_done(run: Path) -> None:
    write(run / "journal.jsonl", [*HALF, event(65, "progress", step=100, seconds={"step": 5})])
    assert "all steps are done" in text_of(read_status(run, T0 + 70))


def test_speed_is_that_of_after_a_roll_back(run: Path) -> None:
    back = event(61, "roll_back", step=51, from_step=50, to_step=40, skipped=[51, 51])
    after = [event(63 + i, "progress", step=44 + 2 * i, seconds={"step": 1}) for i in range(4)]
    write(run / "journal.jsonl", [*HALF, back, *after])
    assert read_status(run, T0 + 70).wall_s_per_step == 0.5


def test_an_end_that_is_overdue_is_not_in_the_past(run: Path) -> None:
    renew(run, 199)
    status = read_status(run, T0 + 200)
    assert status.ends_at == T0 + 200
    assert "no progress was logged for 2 min 20 s" in text_of(status)


def test_a_lock_that_is_not_renewed_is_that_of_a_dead_run(run: Path) -> None:
    status = read_status(run, T0 + 69 + 61)
    assert status.state == "dead"
    assert "61 s ago" in status.reason
    assert status.ends_at is None
    assert status.account.attempts[-1].ending == "killed"
    assert status.account.attempts[-1].ended == T0 + 69
    assert "50 s of running left" in text_of(status)


def test_a_run_that_has_ended_says_how(run: Path) -> None:
    (run / "run.lock").unlink()
    for state in ("finished", "stopped", "failed"):
        outcome = {"state": state, "reason": "because", "step": 50, "num_steps": 100}
        (run / "outcome.json").write_text(json.dumps(outcome))
        status = read_status(run, T0 + 9999)
        assert (status.state, status.reason) == (state, "because")
    (run / "outcome.json").write_text('{"state": "running"')
    assert read_status(run, T0 + 9999).state == "dead"


def test_a_run_that_has_no_step_yet_is_starting(run: Path) -> None:
    write(run / "journal.jsonl", [*HALF, event(68, "start", 2, num_steps=100)])
    status = read_status(run, T0 + 70)
    assert status.state == "starting"
    assert status.account.attempts[0].ending == "killed"
    assert [attempt.ending for attempt in status.account.attempts] == ["killed", "running"]


def test_troubles_are_listed(run: Path) -> None:
    figures = {"lm_loss": 1.23456789, "grad_norm": "nan"}
    bad = [
        event(62, "bad_step", step=51 + i, cause="spike", decision="skip", **figures)
        for i in range(5)
    ]
    back = event(63, "roll_back", step=56, from_step=55, to_step=50, skipped=[51, 56])
    write(run / "journal.jsonl", [*HALF, *bad, back])
    page = text_of(read_status(run, T0 + 70))
    assert "55: spike (lm_loss 1.235, grad_norm nan), skip" in page
    assert "2 more bad steps" in page
    assert "step 55 to 50, data of steps 51 to 56 passed over" in page


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_any_beginning_of_a_journal_is_enough(kept: int, run: Path) -> None:
    write(run / "journal.jsonl", BEGIN[: kept + 1])
    for name in ("metrics", "timing", "validation", "ledger", "stragglers"):
        (run / f"{name}.jsonl").unlink()
    (run / "plan.json").write_text("{")
    assert "state" in text_of(read_status(run, T0 + 70))
    json.dumps(read_status(run, T0 + 70).record())


def test_torn_and_foreign_lines_are_left_out(run: Path) -> None:
    for name in ("journal", "metrics", "timing", "validation", "ledger", "stragglers"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write('[1, 2]\n"x"\n{"step": 99999\n{"event": "progress", "step": 7}\n{"st')
    assert read_status(run, T0 + 70).step == 50


def test_the_end_of_a_long_file_is_read_alone(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [{"step": i} for i in range(1000)])
    records = read_tail(tmp_path / "x.jsonl", max_bytes=100)
    assert records[-1]["step"] == 999
    assert len(records) < 10
    assert read_tail(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: None, "is not a folder; name the run_dir"),
        (lambda run: run.mkdir(), "is not a run folder: it has neither"),
        (lambda run: run.write_text("x"), "is not a folder"),
        (
            lambda run: (run.mkdir(), (run / "config.yaml").touch()),
            "has no record, so nothing was started",
        ),
        (
            lambda run: (run.mkdir(), (run / "journal.jsonl").write_text('{"ev')),
            "has no record, so nothing was started",
        ),
    ],
)
def test_what_is_no_run_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "run")
    with pytest.raises(UserError, match=message) as caught:
        read_events(tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_checkpoint_names_its_run(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step_00000004"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"is a checkpoint; name its run folder, .*/run$"):
        read_events(folder)


def test_the_command_takes_a_path_or_words(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "it's=odd, really"
    odd.mkdir()
    (odd / "journal.jsonl").write_text((run / "journal.jsonl").read_text())
    for words in ([str(run)], [f"run_dir={run}"], [str(odd), f"json={tmp_path}/out.json"]):
        main(words)
        assert "50 of 100" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["step"] == 50


def test_watching_needs_seconds(run: Path) -> None:
    with pytest.raises(UserError, match=r"watch_s=0.0 is not positive; give seconds"):
        main([str(run), "watch_s=0"])


def test_the_command_is_quick_on_a_long_run(run: Path) -> None:
    steps = range(100, 4_000_100, 100)
    lines = [event(s / 10, "progress", step=s, tokens=s, seconds={"step": 9.0}) for s in steps]
    write(run / "journal.jsonl", [*BEGIN, *lines])
    code = "import sys, ring_train.jobs.status as s; s.main(sys.argv[1:]); print(*sys.modules)"
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - begin < 20  # two seconds on a machine of its own
    assert not {"torch", "megatron", "matplotlib"} & set(done.stdout.splitlines()[-1].split())


def test_slopes_need_three_steps() -> None:
    records = [{"step": s, "x": 2.0 * s} for s in (1, 2, 3)]
    assert slope_per_100_steps(records[:2], "x") is None
    assert slope_per_100_steps([records[0]] * 5, "x") is None
    assert slope_per_100_steps(records, "x") == pytest.approx(200)


def test_stragglers_are_slower_than_the_median_of_the_newest_layout() -> None:
    rows = [[9.0, 1.0], [1.0, 1.0, 1.05, 3.0], [1.0, 1.0, 1.05, 1.0]]
    records = [{"step": i, "step_s": row} for i, row in enumerate(rows)]
    assert straggler_ratios(records) == {3: 2.0}
    assert straggler_ratios([{"step": 1, "step_s": [None, 1.0]}]) == {}
    assert straggler_ratios([]) == {}


def test_durations_are_read_at_a_glance() -> None:
    found = [duration(s) for s in (-1, 0.25, 42, 125, 7300, 200000)]
    assert found == ["0.0 s", "0.2 s", "42 s", "2 min 5 s", "2 h 1 min", "2 d 7 h"]


def test_columns_are_aligned() -> None:
    assert aligned([("a", "bbb"), ("ccc", "d")]) == ["a    bbb", "ccc    d"]
