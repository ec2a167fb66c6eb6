"""reproduce repeats a run bit for bit, tells the first difference, and refuses what cannot be."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import OnRanks
from tests.e2e.commands import contents, run_job, succeed


def test_under_torchrun_a_run_on_two_ranks_comes_out_bit_equal(
    trained: Path, tmp_path: Path
) -> None:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [f"run={trained}", f"run_dir={tmp_path}/again"]
    command = [sys.executable, "-m", *torchrun, "-m", "ring_train.jobs.reproduce", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{trained} and {tmp_path}/again: bit-equal\n"
    again = (tmp_path / "again" / "metrics.jsonl").read_bytes()
    assert again == (trained / "metrics.jsonl").read_bytes()


def test_a_stopped_run_is_repeated_until_it_stopped_and_a_difference_is_named(
    short_run: Path, on_ranks: OnRanks
) -> None:
    path = short_run / "metrics.jsonl"
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    altered = {**second, "grad_norm": second["grad_norm"] + 1e-12}
    path.write_text(f"{json.dumps(first)}\n{json.dumps(altered)}\n")
    versions = json.loads((short_run / "versions.json").read_text())
    (short_run / "versions.json").write_text(json.dumps({**versions, "torch": "1.0"}))
    outcome = run_job(on_ranks, 1, "reproduce", [f"run={short_run}"])
    assert outcome.status == 1, outcome.stderr
    assert "-reproduced: step 2, grad_norm: " in outcome.stdout
    assert "(recorded: 1.0)" in outcome.stderr
    again = short_run.with_name("run-reproduced") / "metrics.jsonl"
    assert [json.loads(line) for line in again.read_text().splitlines()] == [first, second]


def test_steps_that_a_run_passed_over_are_passed_over_again(
    training: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    faults = "resilience.faults=['kind=nan step=3 times=2']"
    words = [*training, "train.stop_after_step=4", faults, f"run_dir={run}"]
    succeed(on_ranks, 1, "pretrain", words)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 4]
    outcome = run_job(on_ranks, 1, "reproduce", [f"run={run}"])
    assert outcome.stdout == f"{run} and {run}-reproduced: bit-equal\n", outcome.stderr


def test_another_number_of_ranks_is_told_how_to_start(
    trained: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    words = [f"run={trained}", f"run_dir={tmp_path}/again"]
    outcome = run_job(on_ranks, 1, "reproduce", words)
    assert outcome.status == 2
    command = f"torchrun --nproc-per-node 2 -m ring_train.jobs.reproduce {' '.join(words)}"
    assert command in outcome.stderr
    assert not (tmp_path / "again").exists()


def test_other_data_are_refused(short_run: Path, on_ranks: OnRanks) -> None:
    hashes = json.loads((short_run / "data.json").read_text())
    (short_run / "data.json").write_text(json.dumps({**hashes, "math.valid": "0" * 64}))
    outcome = run_job(on_ranks, 1, "reproduce", [f"run={short_run}"])
    assert outcome.status == 2
    assert "other data: math.valid differ" in outcome.stderr
    assert not short_run.with_name("run-reproduced").exists()


def test_changed_bytes_of_a_shard_are_refused(
    short_run: Path, corpus: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    data = tmp_path / "corpus"
    shutil.copytree(corpus, data)
    config = (short_run / "config.yaml").read_text()
    (short_run / "config.yaml").write_text(config.replace(str(corpus), str(data)))
    shard = data / "math.bin"
    shard.write_bytes(shard.read_bytes()[:-4] + bytes(4))
    outcome = run_job(on_ranks, 1, "reproduce", [f"run={short_run}"])
    assert outcome.status == 2
    assert f"{shard} is not the file that {data}/math.json describes" in outcome.stderr
    assert not short_run.with_name("run-reproduced").exists()


def test_a_run_folder_is_not_repeated_into_itself(trained: Path, on_ranks: OnRanks) -> None:
    before = contents(trained)
    outcome = run_job(on_ranks, 2, "reproduce", [f"run={trained}", f"run_dir={trained}"])
    assert outcome.status == 2
    assert "a repetition starts from nothing" in outcome.stderr
    assert contents(trained) == before
