"""A corpus, words of a short run, and one run per layout that nothing disturbs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.schedules import BASE, LAYOUTS
from tests.chaos.supervisor import Start, run_once
from tests.e2e.conftest import corpus, made_once, shared, training, warm

__all__ = ["corpus", "shared", "training", "warm"]  # fixtures of the end-to-end tests

QuietRun = Callable[[str], Path]


@pytest.fixture
def words(training: list[str]) -> list[str]:
    """Words of a run of eight steps, all but its layout and folder."""
    return [*training, *BASE]


@pytest.fixture
def quiet_run(shared: Path, words: list[str]) -> QuietRun:
    """Return the folder of the undisturbed run of a layout, made once for all workers."""

    def run(layout: str) -> Path:
        folder = shared / f"quiet_{layout}"
        num_ranks, layout_words = LAYOUTS[layout]
        log = shared / f"quiet_{layout}.log"
        start = Start([*words, *layout_words, f"run_dir={folder}"], num_ranks, log)

        def make() -> None:
            assert run_once(start) == [0] * num_ranks, log.read_text()

        return made_once(folder, make)

    return run
