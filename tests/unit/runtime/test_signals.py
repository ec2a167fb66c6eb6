"""Signals stop a job: at once where there is nothing to save, at a safe point within training."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ring_train.runtime.errors import STOPPED_STATUS
from ring_train.runtime.signals import StopRequested, StopSignals


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    installed = StopSignals()
    installed.install()
    yield installed
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_before_training_a_signal_ends_the_job(signals: StopSignals, number: int) -> None:
    with pytest.raises(StopRequested, match="before training began"):
        os.kill(os.getpid(), number)
    assert signals.name == signal.Signals(number).name


def test_within_training_it_is_noted_once(signals: StopSignals) -> None:
    with signals.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        first = signals.received_at
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.name, signals.received_at) == ("SIGUSR1", first)


def test_the_exit_status_says_that_it_can_be_started_again() -> None:
    script = (
        "import os, signal\n"
        "from ring_train.runtime.errors import run_job\n"
        "from ring_train.runtime.signals import SIGNALS\n"
        "SIGNALS.install()\n"
        "run_job(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == STOPPED_STATUS
    assert done.stderr == "stopped by SIGTERM before training began\n"
