"""Chains: what is submitted, in which order, and when nothing is."""

import json
from pathlib import Path

import pytest

from tests.slurm.stubs import FakeSlurm

pytestmark = pytest.mark.timeout(60)
PIPELINE = "slurm/pipeline.sh"


@pytest.fixture
def chain(slurm: FakeSlurm, words: list[str], tmp_path: Path) -> list[str]:
    """Words of a chain of five stages that have not begun."""
    del slurm.environment["SLURM_JOB_ID"]
    for name in ("web.jsonl", "math.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    size = ["--nodes=2", "--ntasks-per-node=2"]
    made = [word.replace("/code", "/shards/web") for word in words if "domains" in word]
    return [
        *("data:", f"input={tmp_path}/*.jsonl", f"tokenizer={tmp_path}/tokenizer"),
        *(f"output={tmp_path}/shards", "build_index:", "--time=60"),
        *("pretrain:", *size, *words, *made, "data.domains.y.path='" + f"{tmp_path}/shards/math'"),
        *("sft:", *size, "train=sft", "train.num_epochs=1", f"run_dir={tmp_path}/chat"),
        *(f"data.domains.x.path={tmp_path}/shards/web",),
        *("export:", "--partition=cpu", f"output={tmp_path}/export"),
    ]


def submissions(slurm: FakeSlurm) -> list[list[str]]:
    """Return the calls of sbatch that were no test."""
    return [words for words in slurm.calls("sbatch") if "--test-only" not in words]


def after(call: list[str]) -> str:
    return next((word.split(":", 1)[1] for word in call if word.startswith("--dependency")), "")


def test_each_stage_waits_for_the_one_before(
    slurm: FakeSlurm, chain: list[str], tmp_path: Path
) -> None:
    done = slurm.run(PIPELINE, *chain)
    assert done.status == 0, done.stderr
    calls = submissions(slurm)
    scripts = [next(word for word in call if word.endswith(".sh")) for call in calls]
    names = ("data", "build_index", "pretrain", "sft", "export")
    assert scripts == [f"slurm/{name}.sh" for name in names]
    assert [after(call) for call in calls] == ["", "101", "102", "103", "104"]
    assert all("--kill-on-invalid-dep=yes" in call for call in calls)
    data, index, pretrain, sft, export = calls
    assert "--array=0-1" in data
    start = pretrain.index("slurm/pretrain.sh")
    assert index[index.index("slurm/build_index.sh") + 1 :] == pretrain[start + 1 :]
    assert "--time=60" in index
    assert f"init_from={tmp_path}/run" in sft
    assert f"checkpoint={tmp_path}/chat" in export
    assert "--partition=cpu" in export
    assert done.stdout.splitlines()[3].split() == ["pretrain", "103", "102", f"{tmp_path}/run"]


def test_nothing_is_submitted_if_the_last_stage_is_wrong(
    slurm: FakeSlurm, chain: list[str]
) -> None:
    done = slurm.run(PIPELINE, *chain, "precisoin=fp32")
    assert done.status == 2
    assert "did you mean precision" in done.problem
    assert not slurm.calls("sbatch")


def test_two_trainings_do_not_share_a_folder(
    slurm: FakeSlurm, chain: list[str], tmp_path: Path
) -> None:
    done = slurm.run(PIPELINE, *[word.replace("/chat", "/run") for word in chain])
    assert done.status == 2
    assert f"sft: run_dir={tmp_path}/run is that of the training before" in done.problem


def test_nothing_is_submitted_if_slurm_refuses_one_stage(
    slurm: FakeSlurm, chain: list[str]
) -> None:
    (slurm.folder / "refuses_export.sh").touch()
    done = slurm.run(PIPELINE, *chain)
    assert done.status == 2
    assert "export: sbatch refuses it, and nothing was submitted" in done.problem
    assert not submissions(slurm)


def test_what_was_submitted_is_cancelled_if_a_later_stage_fails(
    slurm: FakeSlurm, chain: list[str]
) -> None:
    (slurm.folder / "fails_sft.sh").touch()
    done = slurm.run(PIPELINE, *chain)
    assert done.status == 2
    assert "(101 102 103) were cancelled" in done.problem
    assert slurm.calls("scancel") == [["101", "102", "103"]]


def test_stages_that_are_finished_are_left_out(
    slurm: FakeSlurm, chain: list[str], tmp_path: Path
) -> None:
    (tmp_path / "shards").mkdir()
    for name in ("web", "math"):
        (tmp_path / f"shards/{name}.idx").touch()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    ended = {"state": "finished", "num_steps": 100}
    (tmp_path / "run/outcome.json").write_text(json.dumps(ended))
    done = slurm.run(PIPELINE, *chain)
    assert done.status == 0, done.stderr
    rows = [line.split()[:3] for line in done.stdout.splitlines()[1:]]
    left_out = [[name, "finished", "-"] for name in ("data", "build_index", "pretrain")]
    assert rows == [*left_out, ["sft", "101", "-"], ["export", "102", "101"]]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "no stage is given"),
        (["model=tiny"], "'model=tiny' belongs to no stage"),
        (["export:", "output=a", "checkpoint=b", "pretrain:", "model=tiny"], "is no chain"),
        (["build_index:"], "build_index: needs a stage pretrain:"),
        (["export:", "output=a", "checkpoint=nowhere"], "checkpoint=nowhere is no folder"),
        (["pretrain:", "--ntasks=8", "model=tiny"], "say --nodes=N and --ntasks-per-node=N"),
        (["pretrain:", "--nodes", "4", "model=tiny"], "'4' is not key=value"),
        (["data:", "input=no*", "tokenizer=no", "output=x"], "tokenizer=no has no tokenizer.json"),
    ],
)
def test_a_chain_that_makes_no_sense_is_refused(
    slurm: FakeSlurm, arguments: list[str], problem: str
) -> None:
    done = slurm.run(PIPELINE, *arguments)
    assert done.status == 2
    assert problem in done.problem
    assert not slurm.calls("sbatch")
