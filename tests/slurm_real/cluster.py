"""Jobs on the cluster that `make test-slurm` has brought up."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.repo.files import ROOT

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
PATIENCE_S = 600.0
"""Ranks import for 10 s on an idle machine, minutes on a busy one."""


class Job:
    """A submitted job."""

    def __init__(self, number: str) -> None:
        self.number = number

    def facts(self) -> dict[str, str]:
        """Return what Slurm knows."""
        text = output("scontrol", "-o", "show", "job", self.number)
        return dict(re.findall(r"(\w+)=(\S+)", text))

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    def ended(self) -> str:
        """Wait for the end and return the state."""
        wait(lambda: self.state in ENDED, f"job {self.number} has not ended")
        return self.state

    def log(self) -> str:
        path = Path(self.facts()["StdOut"])
        return path.read_text() if path.exists() else ""

    def signal(self, name: str) -> None:
        """Signal the batch script, as --signal=B: does."""
        output("scancel", f"--signal={name}", "--batch", self.number)

    def cancel(self) -> None:
        output("scancel", self.number)


def submit(script: str, *words: str, options: tuple[str, ...] = ()) -> Job:
    """Submit a script of slurm/; two nodes with two ranks each unless options say otherwise."""
    size = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0"]
    line = ["sbatch", "--parsable", *size, *options, f"slurm/{script}.sh", *words]
    return Job(output(*line).strip())


def submit_child(parent: Job, mark: Path) -> Job:
    """Submit a job that makes a file once its parent is done."""
    depends = [f"--dependency=afterok:{parent.number}", "--kill-on-invalid-dep=yes"]
    line = ["sbatch", "--parsable", *depends, f"--output={mark}.log", f"--wrap=touch {mark}"]
    return Job(output(*line).strip())


def output(*line: str) -> str:
    settings = {"RING_TRAIN_INTERFACE": "lo", "RING_TRAIN_WAIT_S": "20", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **settings}
    done = subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    return done.stdout


def wait(condition: Callable[[], Any], problem: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{problem} after {PATIENCE_S:.0f} s"
        time.sleep(0.3)


def journal(run_dir: Path, event: str) -> list[dict[str, Any]]:
    """Return the events of a name."""
    path = run_dir / "journal.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [line for line in lines if line["event"] == event]


def wait_for_step(run_dir: Path, step: int, job: Job, *, attempt: int = 1) -> None:
    """Wait until a start of a run has done a step."""

    def is_there() -> bool:
        assert job.state not in ENDED, job.log()
        done = journal(run_dir, "progress")
        return any(line["step"] >= step and line["attempt"] >= attempt for line in done)

    wait(is_there, f"{run_dir} has not reached step {step} in start {attempt}")
