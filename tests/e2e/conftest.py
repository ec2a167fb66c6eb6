"""A small corpus, one uninterrupted run on it and its export, each made once for all workers."""

import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import OnRanks
from tests.e2e.commands import succeed

NUM_STEPS = 8
SYLLABLES = ("ka", "lo", "mi", "nu", "per", "sta", "tor", "vex", "wil", "yan", "zed", "qu", "brin")
WORDS = [first + second for first in SYLLABLES for second in SYLLABLES]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all xdist workers of this session see."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "e2e"
    shared.mkdir(exist_ok=True)
    # The modeling files that transformers copies out of an export must not reach the home folder.
    os.environ["HF_MODULES_CACHE"] = str(base / "hf_modules")
    return shared


def made_once(folder: Path, make: Callable[[], object]) -> Path:
    """Return a folder that `make` has filled, in this worker or in another."""
    done = folder.with_name(f"{folder.name}.done")
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make()
            done.touch()
    return folder


@pytest.fixture(scope="session")
def corpus(shared: Path) -> Path:
    """Shards of two domains with held-out parts, and their tokenizer, by the real commands."""
    folder = shared / "corpus"
    return made_once(folder, lambda: make_corpus(folder))


def make_corpus(folder: Path) -> None:
    folder.mkdir()
    rng = random.Random(0)
    sizes = {"code": 120, "math": 120, "code_valid": 40, "math_valid": 40, "crumb": 1}
    for name, size in sizes.items():
        lines = [
            json.dumps({"id": f"{name}/{i}", "text": make_text(name, rng), "domain": name})
            for i in range(size)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = f"{folder}/tokenizer"
    pipeline("train_tokenizer", f"input={folder}/*.jsonl", f"output={tokenizer}", "vocab_size=512")
    for name in sizes:
        prefix = f"{folder}/{name}"
        pipeline("tokenize", f"input={prefix}.jsonl", f"tokenizer={tokenizer}", f"output={prefix}")


def make_text(name: str, rng: random.Random) -> str:
    """Return a document that a model can learn something about."""
    if name == "crumb":
        return "alpha"
    if name.startswith("math"):
        pairs = [(rng.randrange(100), rng.randrange(100)) for _ in range(rng.randrange(3, 12))]
        return "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)
    names = rng.choices(WORDS, k=rng.randrange(3, 12))
    return "\n".join(f"def {n}(x):\n    return {n}_{rng.choice(WORDS)}(x)" for n in names)


def pipeline(command: str, *words: str) -> None:
    line = [sys.executable, "-m", f"data_pipeline.{command}", *words]
    done = subprocess.run(line, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def warm(warm_megatron: None, shared: Path) -> None:
    """What commands import is imported once, here, rather than in each of their ranks."""
    import matplotlib.pyplot  # noqa: F401
    import transformers  # noqa: F401

    import ring_train.hf.writer
    import ring_train.train.loop  # noqa: F401


@pytest.fixture(scope="session")
def training(corpus: Path, warm: None) -> list[str]:
    """Words of a run of the tiny model on the corpus, all but its run_dir and layout."""
    words = [
        *("model=tiny", "optim=short", "train=cpu", f"data.tokenizer={corpus}/tokenizer"),
        *(f"train.num_steps={NUM_STEPS}", "train.seq_length=64", "train.micro_batch_size=1"),
        *("train.global_batch_size=4", "train.eval_interval_steps=4", "train.eval_steps=2"),
        *("optim.lr_warmup_steps=2", "optim.wsd_decay_steps=3"),
        *("logging.interval_steps=1", "logging.progress=false", "checkpoint.interval_steps=4"),
        # Wide enough that log-probabilities depend on every tensor.
        "model.init_method_std=0.05",
    ]
    for domain in ("code", "math"):
        words.append(f"data.domains.{domain}.path={corpus}/{domain}")
        words.append(f"data.domains.{domain}.valid_path={corpus}/{domain}_valid")
    return words


@pytest.fixture
def trained(shared: Path, training: list[str], on_ranks: OnRanks) -> Path:
    """The folder of an uninterrupted run on two ranks that share the experts."""
    folder = shared / "whole"
    words = [*training, "parallel=ep2", f"run_dir={folder}"]
    return made_once(folder, lambda: succeed(on_ranks, 2, "pretrain", words))


@pytest.fixture
def exported(shared: Path, trained: Path, on_ranks: OnRanks) -> Path:
    """The fp32 export of that run."""
    folder = shared / "export"
    words = [f"checkpoint={trained}", f"output={folder}", "precision=fp32"]
    return made_once(folder, lambda: succeed(on_ranks, 1, "export", words))


@pytest.fixture
def short_run(shared: Path, training: list[str], on_ranks: OnRanks, tmp_path: Path) -> Path:
    """The folder of two steps on one rank, for a test to damage."""
    folder = shared / "short"
    words = [*training, "train.stop_after_step=2", f"run_dir={folder}"]
    made_once(folder, lambda: succeed(on_ranks, 1, "pretrain", words))
    shutil.copytree(folder, tmp_path / "run")
    return tmp_path / "run"
