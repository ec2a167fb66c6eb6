"""The fine-tuning recipe of Ring-lite on a tiny model, from pretraining to a certificate."""

import json
from pathlib import Path

import pytest

from ring_train.config import read_yaml
from tests.conftest import OnRanks
from tests.e2e.commands import run_command, succeed
from tests.e2e.test_sft import chat, records  # noqa: F401  (chat is a fixture)

CERTIFIED_S = 280
"""Of a command that starts another interpreter, which imports transformers."""


@pytest.fixture
def tuned(
    shared: Path,
    training: list[str],
    chat: Path,  # noqa: F811
    on_ranks: OnRanks,
    tmp_path: Path,
) -> Path:
    """A run of `experiment=ring_lite_sft` on two ranks, from a pretrained model."""
    start = tmp_path / "start"
    words = ["model=tiny_v1", "train.num_steps=4", "optim.wsd_decay_steps=1", f"run_dir={start}"]
    first = [word for word in training if not word.startswith("model=")]
    succeed(on_ranks, 2, "pretrain", [*first, *words, "parallel=ep2"])
    sizes = ["train.seq_length=128", "train.micro_batch_size=1", "train.global_batch_size=2"]
    domains = {"math": "math", "code": "math", "science": "general", "general": "general"}
    run = [
        *("experiment=ring_lite_sft", "parallel.expert_model_parallel_size=2", *sizes),
        *("train.precision=fp32", "train.num_epochs=1", "logging.progress=false"),
        *("logging.interval_steps=1", f"init_from={start}", f"run_dir={tmp_path / 'tuned'}"),
        *(f"data.domains.{name}.path={chat}/{source}" for name, source in domains.items()),
    ]
    succeed(on_ranks, 2, "sft", run)
    return tmp_path / "tuned"


def test_the_recipe_trains_and_its_export_is_certified(
    tuned: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    model = read_yaml(tuned / "config.yaml").model
    assert (model.architecture, model.norm_head) == ("bailing_moe", True)
    assert (model.moe_aux_loss_coeff, model.moe_z_loss_coeff) == (1e-5, 1e-7)
    steps = records(tuned / "metrics.jsonl")
    assert steps[-1]["lm_loss"] < steps[0]["lm_loss"]
    assert all(1 <= step["router/balance_loss"] < 8 / 3 for step in steps)
    folder = tmp_path / "export"
    words = [f"checkpoint={tuned}", f"output={folder}", "precision=fp32"]
    succeed(on_ranks, 1, "export", words)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BailingMoeForCausalLM"]
    job = "ring_train.jobs.verify_export"
    words = [f"hf_dir={folder}", f"checkpoint={tuned}"]
    (outcome,) = on_ranks(1, run_command, job, words, timeout_s=CERTIFIED_S)
    assert outcome.status == 0, outcome.stdout + outcome.stderr
    assert json.loads((folder / "certificate.json").read_text())["passed"]
