"""A run leaves its figures and its record, goes on after a stop, and starts from given weights."""

import json
from pathlib import Path

import pytest

from ring_train.config import read_yaml
from tests.conftest import OnRanks
from tests.e2e.commands import contents, succeed
from tests.e2e.conftest import NUM_STEPS

LAYOUT_TOLERANCE = 1e-4
"""Of losses near 6 after five steps in fp32: sums run in another order in each."""


def records(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_folder_holds_figures_and_record(trained: Path) -> None:
    metrics = records(trained / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, NUM_STEPS + 1))
    wanted = {"lm_loss", "lm_loss/code", "lm_loss/math", "mtp_loss/1", "grad_norm"}
    wanted |= {"learning_rate", "router/max_over_mean", "router/entropy_nats"}
    assert wanted <= metrics[0].keys()
    assert metrics[-1]["lm_loss"] < metrics[0]["lm_loss"]
    timing = records(trained / "timing.jsonl")
    assert all(record["tokens_per_s"] > 0 for record in timing)
    validation = records(trained / "validation.jsonl")
    assert [record["step"] for record in validation] == [4, 8]
    assert {"valid_loss/code", "valid_loss/math"} <= validation[0].keys()
    assert list((trained / "tensorboard").glob("events.*"))
    assert (trained / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert read_yaml(trained / "config.yaml").train.num_steps == NUM_STEPS
    assert json.loads((trained / "plan.json").read_text())["mesh"]["ep"] == 2
    assert {"torch", "megatron-core", "commit"} <= json.loads(
        (trained / "versions.json").read_text()
    ).keys()
    hashes = json.loads((trained / "data.json").read_text())
    assert sorted(hashes) == ["code.train", "code.valid", "math.train", "math.valid"]


def test_a_stopped_run_resumes_as_if_it_had_not_stopped(
    trained: Path, training: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = [*training, "parallel=ep2", f"run_dir={run_dir}"]
    succeed(on_ranks, 2, "pretrain", [*words, "train.stop_after_step=3"])
    assert len(records(run_dir / "metrics.jsonl")) == 3
    outcome = succeed(on_ranks, 2, "pretrain", words)
    assert "other values" not in outcome.stderr
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert (run_dir / name).read_bytes() == (trained / name).read_bytes(), name


def test_a_run_goes_on_under_another_layout(
    trained: Path, training: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    """Begun on expert-parallel ranks, ended on context-parallel ones with sharded moments."""
    run_dir = tmp_path / "run"
    words = [*training, f"run_dir={run_dir}"]
    succeed(on_ranks, 2, "pretrain", [*words, "parallel=ep2", "train.stop_after_step=3"])
    other = ["context_parallel_size=2", "use_distributed_optimizer=true"]
    succeed(on_ranks, 2, "pretrain", [*words, *(f"parallel.{word}" for word in other)])
    found, expected = records(run_dir / "metrics.jsonl"), records(trained / "metrics.jsonl")
    assert found[:3] == expected[:3]
    for ours, whole in zip(found, expected, strict=True):
        for key in ("lm_loss", "lm_loss/code", "lm_loss/math", "mtp_loss/1", "learning_rate"):
            assert ours[key] == pytest.approx(whole[key], abs=LAYOUT_TOLERANCE), key
    ledgers = [records(folder / "ledger.jsonl")[-1] for folder in (run_dir, trained)]
    assert ledgers[0] == ledgers[1]


def test_a_run_that_goes_on_with_other_values_is_warned(
    short_run: Path, training: list[str], on_ranks: OnRanks
) -> None:
    words = [*training, "train.stop_after_step=2", f"run_dir={short_run}"]
    outcome = succeed(on_ranks, 1, "pretrain", [*words, "optim.weight_decay=0.3"])
    warning = "resumes with other values, so reproduce will not repeat it: optim.weight_decay=0.3"
    assert f"{warning} (recorded: 0.1)\n" in outcome.stderr


def test_a_checkpoint_and_its_export_start_a_run_alike(
    trained: Path, exported: Path, training: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    before = contents(trained), contents(exported)
    sources = {"checkpoint": trained / "checkpoints" / "step_00000008", "folder": exported}
    for name, source in sources.items():
        words = [*training, "train.stop_after_step=1", f"run_dir={tmp_path}/{name}"]
        succeed(on_ranks, 1, "pretrain", [*words, f"init_from={source}"])
    first, second = (records(tmp_path / name / "metrics.jsonl")[0] for name in sources)
    assert first["lm_loss"] == second["lm_loss"]
    assert first["mtp_loss/1"] == second["mtp_loss/1"]
    random_start = records(trained / "metrics.jsonl")[0]
    assert first["lm_loss"] < random_start["lm_loss"] - 0.1
    assert (contents(trained), contents(exported)) == before
