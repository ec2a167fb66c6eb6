"""Real jobs of a real Slurm: two nodes with two ranks each, gloo on CPUs, the tiny model.

Two groups of tests, each on nodes of its own, run at a time: waiting for Slurm costs no processor.
"""

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import made_once
from tests.repo.files import ROOT
from tests.slurm_real.cluster import (
    ENDED,
    Job,
    journal,
    output,
    submit,
    submit_child,
    wait,
    wait_for_step,
)

pytestmark = pytest.mark.timeout(900)
WITH_CHAIN = pytest.mark.xdist_group("chain")
ALONE = pytest.mark.xdist_group("alone")
PYTHON = ROOT / ".venv/bin/python"


def on_nodes(first: int, log: Path) -> tuple[str, ...]:
    return (f"--nodelist=node{first},node{first + 1}", f"--output={log}/%x-%j.log")


def digest(run_dir: Path) -> str:
    """Return the digest of everything in the newest checkpoint of a run."""
    line = [str(PYTHON), "-m", "ring_train.jobs.verify_checkpoint", f"folder={run_dir}"]
    return output(*line).splitlines()[-1]


def slow(steps: range, *, after_s: float, attempt: int = 0) -> list[str]:
    """Return faults that make steps take longer, in every start or in one."""
    place = f"rank=0 after_s={after_s} attempt={attempt}"
    return [f"'kind=slow step={step} {place}'" for step in steps]


def faults(*given: str) -> str:
    return f"resilience.faults=[{','.join(given)}]"


@pytest.fixture(scope="session")
def chain(shared: Path, corpus: Path, words: list[str]) -> Path:
    """The folder of a whole chain: an array of shards, pretraining, fine-tuning, export."""
    folder = shared / "chain"

    def run() -> None:
        folder.mkdir()
        place = on_nodes(0, folder)
        two_nodes = [*place, "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2"]
        one_node = ["--nodelist=node0", place[1], "--nodes=1", "--ntasks-per-node=2"]
        shards = [word.replace(f"path={corpus}", f"path={folder}/shards") for word in words]
        tune = ["train=cpu", "train.num_steps=4", "train.seq_length=128", "optim=constant"]
        tune += ["optim.lr_warmup_steps=1"]
        tune += ["train.global_batch_size=4", "train.micro_batch_size=1", "logging.progress=false"]
        tune += [f"data.domains.x.path={folder}/shards/code", "model.init_method_std=0.05"]
        tune += ["train.eval_interval_steps=1000", f"run_dir={folder}/sft"]
        line = [
            *("slurm/pipeline.sh", "data:", place[1], "--cpus-per-task=1"),
            *(f"input={corpus}/*.jsonl", f"tokenizer={corpus}/tokenizer"),
            *(f"output={folder}/shards", "pretrain:", *two_nodes, *shards),
            *(f"run_dir={folder}/pretrain", "sft:", *one_node, "--gpus-per-node=2", *tune),
            *("export:", *one_node, f"output={folder}/export"),
        ]
        table = output("bash", *line)
        (folder / "table.txt").write_text(table)
        (folder / "line.json").write_text(json.dumps(line))
        for row in table.splitlines()[1:]:
            Job(row.split()[1]).ended()

    return made_once(folder, run)


def jobs(chain: Path) -> dict[str, Job]:
    rows = [row.split() for row in (chain / "table.txt").read_text().splitlines()[1:]]
    return {row[0]: Job(row[1]) for row in rows}


@WITH_CHAIN
def test_a_chain_ends_in_a_folder_that_generates(chain: Path) -> None:
    for name, job in jobs(chain).items():
        assert job.state == "COMPLETED", f"{name}: {job.log()}"
    assert journal(chain / "pretrain", "finish")
    words = [f"hf_dir={chain}/export", "prompt=def", "max_new_tokens=4", "temperature=0"]
    assert output(str(PYTHON), "-m", "ring_train.jobs.generate", *words).startswith("def")


@WITH_CHAIN
def test_an_array_makes_the_shards_that_one_command_makes(chain: Path, corpus: Path) -> None:
    logs = sorted(chain.glob("data-*.log"))
    assert len(logs) == 5, "one task a file"
    for name in ("code", "math", "crumb"):
        for suffix in ("bin", "idx"):
            made = (chain / f"shards/{name}.{suffix}").read_bytes()
            assert made == (corpus / f"{name}.{suffix}").read_bytes()


@WITH_CHAIN
def test_a_finished_chain_is_not_submitted_again(chain: Path) -> None:
    table = output("bash", *json.loads((chain / "line.json").read_text()))
    assert table.count("finished") == 4


@WITH_CHAIN
def test_a_killed_rank_a_signal_and_a_preemption_leave_no_trace_in_the_weights(
    shared: Path, chain: Path, words: list[str], tmp_path: Path
) -> None:
    run_dir = shared / "interrupted"
    place = on_nodes(2, tmp_path)
    kill = "'kind=kill step=5 rank=2 attempt=1'"
    given = faults(kill, *slow(range(9, 23), after_s=0.5))
    job = submit("pretrain", *words, f"run_dir={run_dir}", given, options=place)
    wait_for_step(run_dir, 9, job, attempt=2)
    assert "starting them again in this job" in job.log()
    job.signal("USR1")
    wait_for_step(run_dir, 13, job, attempt=3)
    assert int(job.facts()["Restarts"]) == 1
    urgent = ["--partition=urgent", "--nodes=2", "--ntasks-per-node=4", *place, "--wrap=sleep 2"]
    output("sbatch", *urgent)
    child = submit_child(job, tmp_path / "released")
    assert job.ended() == "COMPLETED", job.log()
    assert int(job.facts()["Restarts"]) == 2
    assert child.ended() == "COMPLETED"
    assert len(journal(run_dir, "start")) == 4
    assert len(journal(run_dir, "job_done")) == 1
    whole = chain / "pretrain"
    assert (run_dir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert digest(run_dir) == digest(whole)
    stops = journal(run_dir, "stop")
    assert all(stop["seconds"] < 30 for stop in stops), stops


@ALONE
def test_a_cancelled_job_leaves_a_checkpoint_and_releases_nobody(
    shared: Path, words: list[str], tmp_path: Path
) -> None:
    run_dir = shared / "cancelled"
    slowly = faults(*slow(range(1, 25), after_s=1.0))
    job = submit("pretrain", *words, f"run_dir={run_dir}", slowly, options=on_nodes(4, tmp_path))
    child = submit_child(job, tmp_path / "released")
    wait_for_step(run_dir, 2, job)
    job.cancel()
    assert job.ended() == "CANCELLED"
    assert child.ended() == "CANCELLED"
    assert not (tmp_path / "released").exists()
    wait(lambda: not output("squeue", "-h", "-j", job.number), "the job does not go away")
    assert list((run_dir / "checkpoints").glob("step_*")), job.log()


@ALONE
def test_a_time_limit_leads_to_a_checkpoint_and_a_requeue(
    shared: Path, words: list[str], tmp_path: Path
) -> None:
    run_dir = shared / "limited"
    limit = ("--time=3", "--signal=B:USR1@20")
    given = faults(*slow(range(1, 25), after_s=10.0, attempt=1))
    place = on_nodes(4, tmp_path)
    job = submit("pretrain", *words, f"run_dir={run_dir}", given, options=(*place, *limit))
    wait(lambda: journal(run_dir, "job_requeue") or job.state in ENDED, "no requeue")
    [stop] = journal(run_dir, "stop")
    assert stop["step"] > 0, job.log()
    # A start takes minutes on a busy machine, and the rest is not about the limit.
    output("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    assert job.ended() == "COMPLETED", job.log()
    assert int(job.facts()["Restarts"]) == 1
    assert journal(run_dir, "resume")[0]["step"] == stop["step"]
