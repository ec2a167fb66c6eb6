"""run_job: what a person reads on stderr and which status the shell sees."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
sys.modules["ring_train.runtime"] = type(sys)("ring_train.runtime")  # its import needs torch
sys.modules["ring_train.runtime"].__path__ = ["ring_train/runtime"]
from ring_train.errors import UserError
from ring_train.runtime.errors import run_job

def main():
    {body}

run_job(main)
"""


def run(body: str, rank: int | None = None) -> subprocess.CompletedProcess[str]:
    env = {} if rank is None else {"RANK": str(rank)}
    command = [sys.executable, "-c", SCRIPT.format(body=body)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_a_user_error_is_one_message_and_status_2() -> None:
    done = run("raise UserError('train.num_steps=0 must be positive; choose at least 1')")
    assert done.returncode == 2
    assert done.stderr == "error: train.num_steps=0 must be positive; choose at least 1\n"


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_before_the_runtime_starts_only_rank_0_speaks(rank: int, lines: int) -> None:
    done = run("raise UserError('no')", rank=rank)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == lines


def test_a_user_error_of_a_running_rank_is_told_by_that_rank() -> None:
    done = run("error = UserError('shard is cut'); error.rank = 3; raise error", rank=3)
    assert (done.returncode, done.stderr) == (2, "error: shard is cut\n")


def test_a_bug_keeps_its_traceback() -> None:
    done = run("raise KeyError('surprise')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "surprise" in done.stderr


def test_success_is_status_0() -> None:
    assert run("pass").returncode == 0
