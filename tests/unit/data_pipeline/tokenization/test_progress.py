"""Progress: a bar on a terminal, lines in a log."""

import fcntl
import logging
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from data_pipeline.tokenization.progress import Progress

SCRIPT = """
import time
from data_pipeline.tokenization.progress import Progress
with Progress("shard", 1000, 100) as progress:
    for position in range(200, 1001, 100):
        time.sleep(0.05)
        progress.update(position, 7, 70)
"""


def test_a_terminal_shows_a_bar_with_rates_and_time_left() -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # how Linux says that nobody writes to the terminal any more
            break
    os.close(ours)
    assert process.wait() == 0
    last = [part for part in shown.decode().split("\r") if "shard" in part][-1]
    assert "shard: 100%" in last
    assert "documents/s" in last
    assert "tokens/s" in last
    assert "<00:00" in last, "the time left"


def test_a_log_gets_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("data_pipeline.tokenization.progress.LOG_INTERVAL_S", 0.0)
    caplog.set_level(logging.INFO)
    with Progress("shard", 2_000_000, 0) as progress:
        progress.update(1_000_000, 7, 70)
    assert "1 MB read" in caplog.text
    assert "s left" in caplog.text
