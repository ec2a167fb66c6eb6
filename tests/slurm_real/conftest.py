"""A corpus, words of a run on it, and an uninterrupted run to compare with."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import made_once, make_corpus

NUM_STEPS = 24


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers see, on a cluster that is up."""
    ping = ["scontrol", "ping"]
    if "SLURM_CONF" not in os.environ or subprocess.run(ping, check=False).returncode:
        pytest.skip("no Slurm is up; make test-slurm starts one")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "slurm"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def corpus(shared: Path) -> Path:
    """Documents, tokenizer and shards."""
    folder = shared / "corpus"
    return made_once(folder, lambda: make_corpus(folder))


@pytest.fixture(scope="session")
def words(corpus: Path) -> list[str]:
    """Words of a run of the tiny model, all but its folder: 24 steps, a checkpoint every 8."""
    return [
        *("model=tiny", "optim=short", "train=cpu", f"data.tokenizer={corpus}/tokenizer"),
        *(f"train.num_steps={NUM_STEPS}", "train.seq_length=64", "train.micro_batch_size=1"),
        *("train.global_batch_size=4", "train.eval_interval_steps=1000", "parallel=ep2"),
        *("optim.lr_warmup_steps=2", "optim.wsd_decay_steps=3", "model.init_method_std=0.05"),
        *("logging.interval_steps=1", "logging.progress=false", "checkpoint.interval_steps=8"),
        *(f"data.domains.{name}.path={corpus}/{name}" for name in ("code", "math")),
    ]
