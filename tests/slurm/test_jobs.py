"""Containers, jobs without checkpoints, and the scripts as text; Slurm is a folder of stubs."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.repo.files import ROOT
from tests.slurm.stubs import FakeSlurm

pytestmark = pytest.mark.timeout(60)
PRETRAIN = "slurm/pretrain.sh"


def test_pyxis_gets_image_mounts_and_folder(
    slurm: FakeSlurm, words: list[str], tmp_path: Path
) -> None:
    image = tmp_path / "image.sqsh"
    image.touch()
    slurm.environment |= {"RING_CONTAINER": str(image), "RING_CONTAINER_MOUNTS": "data:data"}
    assert slurm.run(PRETRAIN, *words).status == 0
    check, ranks = slurm.calls("srun")
    mounts = f"--container-mounts={ROOT}:{ROOT},data:data"
    place = [f"--container-image={image}", f"--container-workdir={ROOT}"]
    assert {*place, mounts} <= set(check)
    assert {*place, f"{mounts},{tmp_path}/run:{tmp_path}/run"} <= set(ranks)


def test_apptainer_runs_the_ranks(slurm: FakeSlurm, words: list[str], tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    image.touch()
    slurm.environment["RING_CONTAINER"] = str(image)
    assert slurm.run(PRETRAIN, *words).status == 0
    _, ranks = slurm.calls("apptainer")
    start = ranks.index(str(image))
    assert ranks[:4] == ["exec", "--nv", "--bind", f"{ROOT}:{ROOT},{tmp_path}/run:{tmp_path}/run"]
    module = ["bash", "slurm/rank.sh", "ring_train.jobs.pretrain"]
    assert ranks[start + 1 :] == [*module, *words]


@pytest.fixture
def raw(tmp_path: Path, words: list[str]) -> list[str]:
    """Words of a tokenization of two files."""
    for name in ("web.jsonl", "math.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}\n')
    return [f"input={tmp_path}/*.jsonl", f"tokenizer={tmp_path}/tokenizer", f"output={tmp_path}/o"]


def test_an_array_task_takes_the_file_of_its_number(
    slurm: FakeSlurm, raw: list[str], tmp_path: Path
) -> None:
    slurm.environment |= {"SLURM_ARRAY_TASK_ID": "1", "SLURM_CPUS_PER_TASK": "6"}
    done = slurm.run("slurm/data.sh", *raw)
    assert done.status == 0, done.stderr
    [rank] = slurm.ranks()
    pair = [f"input={tmp_path}/web.jsonl", f"output={tmp_path}/o/web"]
    assert rank == ["-m", "data_pipeline.tokenize", *pair, raw[1], "workers=6"]


@pytest.mark.parametrize("task", ["2", ""])
def test_an_array_task_without_a_file_is_refused(
    slurm: FakeSlurm, raw: list[str], task: str
) -> None:
    slurm.environment["SLURM_ARRAY_TASK_ID"] = task
    done = slurm.run("slurm/data.sh", *raw)
    assert done.status == 2
    assert "the input is 2 files; submit it with --array=0-1" in done.problem


def test_an_export_starts_again_if_it_dies_and_is_given_up(
    slurm: FakeSlurm, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    slurm.environment |= {"REAL_CHECKS": "1", "RING_TRAIN_PAUSE_S": "0"}
    slurm.plays(*[{"status": 1}] * 9)
    done = slurm.run("slurm/export.sh", f"checkpoint={tmp_path}/run", f"output={tmp_path}/export")
    assert done.status == 1
    assert len(slurm.ranks()) == 4


def test_an_export_of_nothing_is_refused(slurm: FakeSlurm, tmp_path: Path) -> None:
    slurm.environment["REAL_CHECKS"] = "1"
    done = slurm.run("slurm/export.sh", f"checkpoint={tmp_path}/run", f"output={tmp_path}/export")
    assert done.status == 2
    assert f"checkpoint={tmp_path}/run is no folder" in done.problem


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(slurm: FakeSlurm) -> None:
    scripts = [*ROOT.glob("slurm/*.sh"), *ROOT.glob("tools/*.sh")]
    line = ["shellcheck", "-x", "--source-path=.", *map(str, scripts)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_setting_says_what_it_is_for_and_gives_way(slurm: FakeSlurm) -> None:
    for line in (ROOT / "slurm/environment.sh").read_text().splitlines():
        if "export " in line and not line.startswith("#"):
            assert " # " in line, line
            name = line.split("export ")[1].split("=")[0]
            assert f"${{{name}:-" in line or name == "GLOO_SOCKET_IFNAME", line


@pytest.mark.parametrize("apt", [None, "exit 100"])
def test_without_slurm_its_tests_say_that_they_were_skipped(
    tmp_path: Path, apt: str | None
) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    if apt is not None:
        (tmp_path / "apt-get").write_text(f"#!/bin/bash\n{apt}\n")
        (tmp_path / "apt-get").chmod(0o755)
    done = subprocess.run(
        [tmp_path / "bash", ROOT / "tools/test_slurm.sh"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "SKIPPED, real Slurm was not tested: " in done.stdout
