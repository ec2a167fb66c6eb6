"""One fault at a time: what each leaves, and that the run goes on from it as promised."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ring_train.resilience.deadline import DEADLINE_VARIABLE
from ring_train.resilience.journal import JOURNAL_FILE, read_journal
from ring_train.resilience.outcome import State, read_outcome
from ring_train.runtime.errors import HANG_STATUS, STOPPED_STATUS, USER_ERROR_STATUS
from tests.chaos.conftest import QuietRun
from tests.chaos.schedules import LAYOUTS
from tests.chaos.supervisor import Start, run_once
from tests.chaos.test_chaos import RECORDS, tensor_digests

pytestmark = pytest.mark.timeout(600)

Begin = Callable[..., list[int | None]]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def begin(words: list[str], warm: None, tmp_path: Path, run_dir: Path) -> Begin:
    """Start the run once, with faults and more words, and tell the exit statuses."""

    def start(layout: str, *faults: str, words: list[str] = words, more: Any = ()) -> Any:
        num_ranks, layout_words = LAYOUTS[layout]
        injected = [f"resilience.faults={list(faults)}"] if faults else []
        all_words = [*words, *layout_words, f"run_dir={run_dir}", *injected, *more]
        return run_once(Start(all_words, num_ranks, tmp_path / "log"))

    return start


def events(run_dir: Path, *names: str) -> list[dict[str, Any]]:
    return [event for event in read_journal(run_dir) if event["event"] in names]


def assert_equal(run_dir: Path, quiet: Path) -> None:
    for name in RECORDS:
        assert (run_dir / name).read_bytes() == (quiet / name).read_bytes(), name
    assert tensor_digests(run_dir) == tensor_digests(quiet)


def saved_steps(run_dir: Path) -> list[int]:
    from ring_train.checkpoint.folders import whole_steps

    return whole_steps(run_dir / "checkpoints")


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_a_signal_within_a_step_drops_the_step(
    layout: str, begin: Begin, quiet_run: QuietRun, run_dir: Path
) -> None:
    """Of step 6 nothing remains, though micro batches of it were computed when SIGTERM came."""
    fault = "kind=sigterm phase=forward step=6 call=1 rank=1"
    assert begin(layout, fault) == [STOPPED_STATUS, STOPPED_STATUS]
    step = 5
    assert saved_steps(run_dir)[-1] == step
    (stop,) = events(run_dir, "stop")
    assert (stop["step"], stop["reason"]) in [(step, "SIGTERM"), (step, "a signal to another rank")]
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert (outcome.state, outcome.step) == (State.stopped, step)
    assert begin(layout) == [0, 0]
    assert_equal(run_dir, quiet_run(layout))


def test_a_signal_drops_a_step_in_the_middle_of_a_deep_pipeline(
    words: list[str], warm: None, run_dir: Path, tmp_path: Path
) -> None:
    """Four stages, of which the third is told, stop before micro batches 6, 5, 4 and 3."""
    layout = ["parallel.pipeline_model_parallel_size=4", "train.global_batch_size=8"]
    fault = ["resilience.faults=['kind=sigterm phase=forward step=3 call=2 rank=2']"]
    start = Start([*words, *layout, *fault, f"run_dir={run_dir}"], 4, tmp_path / "log")
    assert run_once(start) == [STOPPED_STATUS] * 4, (tmp_path / "log").read_text()
    assert saved_steps(run_dir)[-1] == 2


def test_an_interleaved_pipeline_finishes_its_step(
    words: list[str], begin: Begin, run_dir: Path
) -> None:
    more = ["parallel.virtual_pipeline_model_parallel_size=2"]
    fault = "kind=sigterm phase=forward step=3 rank=0"
    assert begin("pp2", fault, more=more) == [STOPPED_STATUS] * 2
    assert saved_steps(run_dir)[-1] == 3


def test_a_validation_that_was_stopped_is_made_again(
    begin: Begin, quiet_run: QuietRun, run_dir: Path
) -> None:
    assert begin("ep2", "kind=sigusr1 phase=validate step=4 rank=0") == [STOPPED_STATUS] * 2
    assert not (run_dir / "validation.jsonl").exists()
    assert saved_steps(run_dir)[-1] == 4
    assert begin("ep2") == [0, 0]
    assert_equal(run_dir, quiet_run("ep2"))


def test_a_signal_before_training_ends_at_once(begin: Begin, run_dir: Path) -> None:
    assert STOPPED_STATUS in begin("ep2", "kind=sigterm phase=start")
    assert not (run_dir / "checkpoints").exists()
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert (outcome.state, outcome.reason) == (State.stopped, "SIGTERM")


def test_a_run_stops_before_the_deadline(
    begin: Begin, quiet_run: QuietRun, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is slow, so two saves are reserved; the checkpoint is durable in time."""
    slow = "kind=slow_disk step=1 times=99 after_s=0.3"
    at = time.time() + 20
    monkeypatch.setenv(DEADLINE_VARIABLE, str(at))
    more = ["resilience.stop_margin_s=1"]
    steps = [f"kind=slow step={step} after_s=2.5" for step in range(1, 9)]
    assert begin("ep2", slow, *steps, more=more) == [STOPPED_STATUS] * 2
    (stop,) = events(run_dir, "stop")
    assert stop["reason"] == "deadline"
    assert 0 < stop["step"] < 8
    saved = [event for event in events(run_dir, "saved") if event["step"] == stop["step"]]
    assert saved[-1]["time"] < at
    monkeypatch.delenv(DEADLINE_VARIABLE)
    assert begin("ep2") == [0, 0]
    assert_equal(run_dir, quiet_run("ep2"))


def test_what_one_rank_finds_bad_no_rank_applies(
    begin: Begin, quiet_run: QuietRun, run_dir: Path
) -> None:
    """With whole gradients on each rank, NaN on one is invisible to the other."""
    more = ["parallel.use_distributed_optimizer=false"]
    assert begin("dp2", "kind=nan step=4 rank=1 times=2", more=more) == [0, 0]
    bad = events(run_dir, "bad_step")
    assert [(event["step"], event["decision"]) for event in bad] == [(4, "rerun"), (4, "skip")]
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]
    assert steps == [1, 2, 3, 5, 6, 7, 8]


def test_nan_that_does_not_come_again_changes_nothing(
    begin: Begin, quiet_run: QuietRun, run_dir: Path
) -> None:
    assert begin("ep2", "kind=nan step=4 rank=1") == [0, 0]
    assert [event["decision"] for event in events(run_dir, "bad_step")] == ["rerun"]
    assert_equal(run_dir, quiet_run("ep2"))


BAD = [f"kind=nan step={step} times=2" for step in (5, 6, 7)]


def test_bad_step_after_bad_step_rolls_back_and_passes_over_their_data(
    begin: Begin, run_dir: Path
) -> None:
    assert begin("ep2", *BAD) == [0, 0]
    (back,) = events(run_dir, "roll_back")
    assert (back["to_step"], back["skipped"]) == (4, [5, 7])
    told = run_dir.with_name("told")
    more = ["resilience.skip_steps=[5,6,7]", f"run_dir={told}"]
    assert begin("ep2", more=more) == [0, 0]
    assert_equal(run_dir, told)


def test_a_roll_back_that_a_kill_interrupts_is_ended_by_the_next_start(
    begin: Begin, run_dir: Path
) -> None:
    faults = [*BAD, "kind=kill phase=roll_back step=7"]
    assert begin("ep2", *faults) == [-9, -9]
    assert saved_steps(run_dir)[-1] == 6, "the later checkpoint is still there"
    assert begin("ep2", *faults) == [0, 0]
    (resume,) = events(run_dir, "resume")
    assert resume["step"] == 4
    told = run_dir.with_name("told")
    more = ["resilience.skip_steps=[5,6,7]", f"run_dir={told}"]
    assert begin("ep2", more=more) == [0, 0]
    assert_equal(run_dir, told)


def test_a_run_that_stays_bad_stops_for_a_person(
    begin: Begin, run_dir: Path, tmp_path: Path
) -> None:
    faults = [f"kind=nan step={step} times=9" for step in range(3, 9)]
    more = ["resilience.max_roll_backs=1"]
    assert begin("ep2", *faults, more=more) == [USER_ERROR_STATUS] * 2
    assert len(events(run_dir, "roll_back")) == 1
    text = (tmp_path / "log").read_text()
    assert text.count("error: steps 6 to 8 are bad after 1 roll-backs") == 1
    assert "Traceback" not in text
    outcome = read_outcome(run_dir)
    assert outcome is not None
    assert outcome.state is State.failed


def test_a_hang_leaves_the_stacks_of_every_rank(
    begin: Begin, quiet_run: QuietRun, run_dir: Path
) -> None:
    more = ["resilience.hang_timeout_s=5"]
    assert begin("ep2", "kind=hang phase=data step=3 rank=1", more=more) == [HANG_STATUS] * 2
    told = {event["rank"]: event["phase"] for event in events(run_dir, "hang")}
    assert told[1] == "data", "the culprit is in another phase than the one that waits for it"
    assert told.keys() == {0, 1}
    stacks = [(run_dir / f"stacks/attempt_1_rank_{rank}.txt").read_text() for rank in (0, 1)]
    assert "faults.py" in stacks[1]
    assert "judged_step.py" in stacks[0]
    assert begin("ep2") == [0, 0]
    assert_equal(run_dir, quiet_run("ep2"))


def test_pictures_that_take_long_are_no_hang(
    begin: Begin, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ring_train.resilience import watchdog
    from ring_train.train import plots

    monkeypatch.setitem(watchdog.PATIENCE, "finish", 1.0)
    monkeypatch.setattr(plots, "write_plots", lambda plan, rank: time.sleep(11 if rank == 0 else 0))
    assert begin("ep2", more=["train.stop_after_step=1"]) == [0, 0]
    assert not events(run_dir, "hang")


def test_a_damaged_checkpoint_stops_a_run_that_was_not_told_otherwise(
    begin: Begin, quiet_run: QuietRun, run_dir: Path, tmp_path: Path
) -> None:
    assert STOPPED_STATUS in begin("ep2", "kind=sigterm phase=update step=5")
    newest = run_dir / "checkpoints" / f"step_{saved_steps(run_dir)[-1]:08d}"
    file = newest / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    more = ["resilience.resume_from_previous=false"]
    assert begin("ep2", more=more) == [USER_ERROR_STATUS] * 2
    assert "the checkpoint is damaged" in (tmp_path / "log").read_text()
    assert begin("ep2") == [0, 0]
    (damaged,) = events(run_dir, "damaged_checkpoint")
    assert Path(damaged["folder"]).is_dir(), "a person may want it"
    assert_equal(run_dir, quiet_run("ep2"))


def test_a_folder_that_a_live_job_uses_is_refused(
    words: list[str], begin: Begin, run_dir: Path, tmp_path: Path
) -> None:
    from ring_train.resilience.run_lock import RunLock

    run_dir.mkdir()
    lock = RunLock(run_dir, "77")
    lock.acquire()
    assert begin("ep2") == [USER_ERROR_STATUS] * 2
    assert f"run_dir={run_dir} is in use by a live job" in (tmp_path / "log").read_text()
    assert not (run_dir / JOURNAL_FILE).exists()
    lock.release()


def test_a_finished_run_is_left_as_it_is(begin: Begin, run_dir: Path) -> None:
    assert begin("ep2") == [0, 0]
    before = {name: (run_dir / name).read_bytes() for name in RECORDS}, tensor_digests(run_dir)
    assert begin("ep2") == [0, 0]
    after = {name: (run_dir / name).read_bytes() for name in RECORDS}, tensor_digests(run_dir)
    assert after == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that holds four checkpoints of 7.5 MB: keep=3 and the next."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root alone, and not in every container")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Take all room that is left on a file system."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    return ballast


def test_a_disk_that_is_full_for_a_while_costs_nothing(
    begin: Begin, quiet_run: QuietRun, small_disk: Path
) -> None:
    run_dir = small_disk / "run"
    more = [f"run_dir={run_dir}", f"data.index_dir={quiet_run('ep2')}/index"]
    slow = [f"kind=slow step={step} after_s=0.5" for step in range(1, 9)]

    def fill_for_a_while() -> None:
        while not (run_dir / "metrics.jsonl").exists():
            time.sleep(0.01)
        ballast = fill(small_disk)
        time.sleep(8)
        ballast.unlink()

    thread = threading.Thread(target=fill_for_a_while)
    thread.start()
    assert begin("ep2", *slow, more=more) == [0, 0]
    thread.join()
    assert events(run_dir, "save_failed")
    assert_equal(run_dir, quiet_run("ep2"))


def test_a_disk_that_stays_full_stops_the_run_and_breaks_nothing(
    begin: Begin, quiet_run: QuietRun, small_disk: Path, tmp_path: Path
) -> None:
    run_dir = small_disk / "run"
    more = [
        *(f"run_dir={run_dir}", f"data.index_dir={quiet_run('ep2')}/index"),
        *("resilience.io_patience_s=4", "train.stop_after_step=2"),
    ]
    assert begin("ep2", more=more) == [0, 0]
    ballast = fill(small_disk)
    more[-1] = "checkpoint.interval_steps=1"
    assert begin("ep2", more=more) == [USER_ERROR_STATUS] * 2
    text = (tmp_path / "log").read_text()
    assert "Traceback" not in text, text[-3000:]
    assert saved_steps(run_dir) == [2]
    ballast.unlink()
    assert begin("ep2", more=[*more[:2], "checkpoint.interval_steps=2"]) == [0, 0]
    assert_equal(run_dir, quiet_run("ep2"))
