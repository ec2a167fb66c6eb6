"""A fake cluster for each test."""

from pathlib import Path

import pytest

from tests.slurm.stubs import FakeSlurm


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    """Stubs on PATH, one rank that ends well, and the environment of a job."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    fake = FakeSlurm(folder)
    fake.plays({"status": 0, "saves": [8]})
    return fake


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Words of a legal run of four ranks; its folder is tmp_path/run."""
    for name in ("code.idx", "tokenizer/tokenizer.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return [
        *("model=tiny", "train=cpu", "optim=short", f"run_dir={tmp_path}/run"),
        *("train.global_batch_size=4", "train.micro_batch_size=1"),
        *(f"data.domains.code.path={tmp_path}/code", f"data.tokenizer={tmp_path}/tokenizer"),
    ]
