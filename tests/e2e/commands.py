"""Running the commands of the project as a shell would, and what they leave."""

import contextlib
import hashlib
import io
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tests.conftest import OnRanks


@dataclass(frozen=True)
class Outcome:
    """What a shell sees of one rank."""

    status: int
    stdout: str
    stderr: str


def run_command(module: str, words: list[str]) -> Outcome:
    """Run `python -m module *words` in this process, which is to end afterwards."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with (
        mock.patch.object(sys, "argv", [module, *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Outcome(status, out.getvalue(), err.getvalue())


def run_job(on_ranks: OnRanks, num_ranks: int, job: str, words: list[str]) -> Outcome:
    """Run a command on forked ranks; return what rank 0 leaves once all ranks have ended."""
    return on_ranks(num_ranks, run_command, f"ring_train.jobs.{job}", words)[0]


def succeed(on_ranks: OnRanks, num_ranks: int, job: str, words: list[str]) -> Outcome:
    """Run a command that must exit with 0."""
    outcome = run_job(on_ranks, num_ranks, job, words)
    assert outcome.status == 0, outcome.stderr
    return outcome


TALES = {"journal.jsonl", "outcome.json"}
"""Files of a run folder that tell of every start, also of one that was refused."""


def contents(folder: Path) -> dict[str, str]:
    """Return the hash of every file in a folder, by path; but those that tell of every start."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in TALES
    }
