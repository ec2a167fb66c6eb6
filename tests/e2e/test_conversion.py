"""A softmax model made into a hybrid one trains on from where it was; a run's average is usable."""

import json
from pathlib import Path

import pytest

from tests.conftest import OnRanks
from tests.e2e.commands import run_job, succeed
from tests.e2e.conftest import made_once

SOFTMAX = ["model.architecture=bailing_moe_v2", "model.layer_group_size=1"]
CONSTANT_RATE = [
    *("optim.lr_decay_style=constant", "optim.wsd_decay_steps=0", "train.eval_interval_steps=0"),
    *("checkpoint.interval_steps=10", "checkpoint.keep=null"),
]
FEW_STEPS = ["train.num_steps=12"]


@pytest.fixture
def softmax_run(shared: Path, training: list[str], on_ranks: OnRanks) -> Path:
    """The folder of a softmax model's run at a constant rate."""
    folder = shared / "softmax"
    words = [*training, *SOFTMAX, *CONSTANT_RATE, "train.num_steps=40", f"run_dir={folder}"]
    return made_once(folder, lambda: succeed(on_ranks, 1, "pretrain", words))


def losses(on_ranks: OnRanks, run: Path, weights: list[Path], output: Path) -> list[float]:
    """Return the mean held-out loss of each of the weights, by the command."""
    names = ",".join(map(str, weights))
    succeed(on_ranks, 1, "validate", [f"weights=[{names}]", f"run={run}", f"output={output}"])
    rows = json.loads(output.read_text())["of"]
    assert [row.pop("weights") for row in rows]
    return [sum(row.values()) / len(row) for row in rows]


def test_a_converted_model_recovers_faster_than_one_from_scratch(
    softmax_run: Path, training: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    softmax, hybrid = tmp_path / "softmax", tmp_path / "hybrid"
    words = [f"checkpoint={softmax_run}", f"output={softmax}", "precision=fp32"]
    succeed(on_ranks, 1, "export", words)
    pattern = ["layer_group_size=2", "group_norm_size=2"]
    words = [f"hf_dir={softmax}", f"output={hybrid}", *pattern]
    outcome = succeed(on_ranks, 2, "convert", words)
    assert "layers 0 2 from gqa to lightning; weights in fp32" in outcome.stdout
    again = run_job(on_ranks, 1, "convert", words)
    assert (again.status, again.stdout) == (2, "")
    assert f"output={hybrid} is not empty" in again.stderr
    runs = {"converted": [f"init_from={hybrid}"], "scratch": []}
    for name, start in runs.items():
        words = [*training, *CONSTANT_RATE, *FEW_STEPS, *start, f"run_dir={tmp_path}/{name}"]
        succeed(on_ranks, 1, "pretrain", words)
    weights = [softmax, hybrid, *(tmp_path / name for name in runs)]
    original, before, converted, scratch = losses(
        on_ranks, softmax_run, weights, tmp_path / "losses.json"
    )
    assert converted < before
    assert converted - original < (scratch - original) / 2


def test_merged_checkpoints_are_validated_exported_and_trained_on(
    softmax_run: Path, training: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    words = [f"run_dir={softmax_run}", "last=3", f"output={merged}"]
    outcome = succeed(
        on_ranks, 1, "merge_checkpoints", [*words, f"validation={tmp_path}/losses.json"]
    )
    assert " 0.33333  step 20\n 0.33333  step 30\n 0.33333  step 40\n" in outcome.stdout
    rows = json.loads((tmp_path / "losses.json").read_text())["of"]
    assert [Path(row["weights"]).name for row in rows] == ["merged", "step_00000040"]
    assert rows[0]["math"] != rows[1]["math"]
    verified = succeed(on_ranks, 1, "verify_checkpoint", [f"folder={merged}"])
    assert "merged from steps [20, 30, 40] by curve=linear" in verified.stdout
    succeed(on_ranks, 1, "export", [f"checkpoint={merged}", f"output={tmp_path}/hf"])
    start = [f"init_from={merged}", "train.stop_after_step=1", f"run_dir={tmp_path}/run"]
    succeed(on_ranks, 2, "pretrain", [*training, *SOFTMAX, "parallel=tp2", *start])
    again = run_job(on_ranks, 1, "merge_checkpoints", words)
    assert (again.status, again.stdout) == (2, "")
    assert again.stderr.startswith(f"error: output={merged} exists; choose a new path")
