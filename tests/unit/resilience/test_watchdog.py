"""A rank without progress dumps its stacks, tells the journal, and ends."""

import multiprocessing
import time
from pathlib import Path

from ring_train.resilience.journal import Journal, read_journal
from ring_train.resilience.watchdog import Watchdog
from ring_train.runtime.errors import HANG_STATUS

TIMEOUT_S = 0.5


def run(run_dir: Path, beats: list[tuple[str, float]]) -> int | None:
    """Return the exit status of a process that beats and sleeps."""
    process = multiprocessing.get_context("fork").Process(target=_live, args=(run_dir, beats))
    process.start()
    process.join()
    return process.exitcode


def _live(run_dir: Path, beats: list[tuple[str, float]]) -> None:
    journal = Journal(run_dir, attempt=3, rank=1)
    watchdog = Watchdog(run_dir, journal, timeout_s=TIMEOUT_S, grace_s=0.1)
    watchdog.start()
    for phase, seconds in beats:
        watchdog.beat(phase)
        _a_function_that_takes_long(seconds)
    watchdog.stop()


def _a_function_that_takes_long(seconds: float) -> None:
    time.sleep(seconds)


def test_a_rank_that_makes_progress_lives(tmp_path: Path) -> None:
    assert run(tmp_path, [("forward", 0.3)] * 5) == 0
    assert read_journal(tmp_path) == []


def test_a_rank_that_hangs_says_where_and_ends(tmp_path: Path) -> None:
    assert run(tmp_path, [("data", 0.1), ("forward", 30.0)]) == HANG_STATUS
    (hang,) = read_journal(tmp_path)
    assert (hang["event"], hang["rank"], hang["phase"]) == ("hang", 1, "forward")
    assert TIMEOUT_S <= hang["seconds"] < 10 * TIMEOUT_S
    stacks = (tmp_path / "stacks/attempt_3_rank_1.txt").read_text()
    assert "_a_function_that_takes_long" in stacks


def test_a_save_may_take_longer(tmp_path: Path) -> None:
    assert run(tmp_path, [("save", 2 * TIMEOUT_S)]) == 0
