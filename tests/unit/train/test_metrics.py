"""Records of a run: what a step says, and what remains of them after a resume."""

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ring_train.platform  # noqa: F401  (before the first import of megatron-core)
from ring_train.model.router import RouterLoad
from ring_train.train.metrics import MetricsWriter, answers_path, load_figures, step_metrics
from ring_train.train.step import LossSums, StepResult


def write(run_dir: Path, name: str, steps: range, tail: str = "") -> None:
    lines = [json.dumps({"step": step, "value": step / 2}) + "\n" for step in steps]
    (run_dir / name).write_text("".join(lines) + tail)


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_resume_drops_the_records_past_the_restored_step(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "timing.jsonl", "validation.jsonl"):
        write(tmp_path, name, range(1, 8))
    writer = MetricsWriter(tmp_path, done_steps=4, tensorboard=False)
    for name in ("metrics.jsonl", "timing.jsonl", "validation.jsonl"):
        assert steps_of(tmp_path / name) == [1, 2, 3, 4]
    writer.write("metrics", 5, {"value": 1.5})
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_drops_the_answers_past_the_restored_step(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        path = answers_path(tmp_path, step)
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}\n")
    write(tmp_path, "evaluation.jsonl", range(2, 8, 2))
    MetricsWriter(tmp_path, done_steps=4, tensorboard=False)
    kept = sorted(path.name for path in (tmp_path / "answers").iterdir())
    assert kept == ["step_00000002.jsonl", "step_00000004.jsonl"]
    assert steps_of(tmp_path / "evaluation.jsonl") == [2, 4]


def test_what_is_kept_is_kept_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path, "metrics.jsonl", range(1, 4))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    MetricsWriter(tmp_path, done_steps=3, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("torn", ['{"step": 5, "va', '{"step": 5', "{", '{"step": 4, "value": 2'])
def test_a_torn_last_line_is_dropped_and_said(
    torn: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "metrics.jsonl", range(1, 4), tail=torn)
    with caplog.at_level(logging.WARNING):
        MetricsWriter(tmp_path, done_steps=4, tensorboard=False).write("metrics", 4, {"x": 1.0})
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert "torn record" in caplog.text


def test_a_new_run_starts_empty(tmp_path: Path) -> None:
    write(tmp_path, "metrics.jsonl", range(1, 4))
    MetricsWriter(tmp_path, done_steps=0, tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, done_steps=0, tensorboard=True)
    for step in (1, 2):
        writer.write("metrics", step, {"lm_loss": 5.0 / step})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("metrics/lm_loss")
    assert [(event.step, event.value) for event in events] == [(1, 5.0), (2, 2.5)]


def result(counts: list[int]) -> StepResult:
    """Return two domains of 30 and 0 tokens, one MTP depth, and one MoE layer."""
    return StepResult(
        sums=LossSums(
            domain_loss=torch.tensor([60.0, 0.0]),
            domain_tokens=torch.tensor([30.0, 0.0]),
            mtp_loss=torch.tensor([75.0]),
            mtp_tokens=torch.tensor([25.0]),
        ),
        grad_norm=1.5,
        learning_rate=1e-3,
        loads={2: RouterLoad(torch.tensor(counts), torch.tensor(4.0))},
    )


def test_a_domain_without_tokens_has_no_loss() -> None:
    step = result([1, 1])
    record = step_metrics(step, ["code", "prose"], load_figures(step))
    assert record["lm_loss"] == record["lm_loss/code"] == 2.0
    assert record["mtp_loss/1"] == 3.0
    assert "lm_loss/prose" not in record
    assert record["trained_tokens/prose"] == 0
    assert all(map(math.isfinite, record.values()))


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([5, 5, 5, 5], {"max_over_mean": 1.0, "entropy_nats": math.log(4), "dead_experts": 0.0}),
        ([8, 8, 0, 0], {"max_over_mean": 2.0, "entropy_nats": math.log(2), "dead_experts": 2.0}),
        ([20, 0, 0, 0], {"max_over_mean": 4.0, "entropy_nats": 0.0, "dead_experts": 3.0}),
    ],
)
def test_expert_load(counts: list[int], expected: dict[str, float]) -> None:
    figures: dict[str, Any] = load_figures(result(counts))[2]
    assert figures == pytest.approx({**expected, "z_loss": 4.0})


def test_the_balance_loss_is_a_figure_where_it_is_trained_with() -> None:
    step = result([1, 1])
    assert "router/balance_loss" not in step_metrics(step, ["code", "prose"], load_figures(step))
    loads = {2: replace(step.loads[2], balance_loss=torch.tensor(1.5))}
    step = replace(step, loads=loads)
    record = step_metrics(step, ["code", "prose"], load_figures(step))
    assert record["router/balance_loss"] == 1.5


def test_figures_of_routers_are_means_over_layers() -> None:
    loads = {
        number: {"max_over_mean": x, "entropy_nats": x, "dead_experts": x, "z_loss": x}
        for number, x in ((2, 1.0), (9, 3.0))
    }
    record = step_metrics(result([1, 1]), ["code", "prose"], loads)
    assert record["router/max_over_mean"] == record["router/dead_experts"] == 2.0
    assert record["router_layer/max_over_mean/9"] == 3.0


def test_a_disk_that_refuses_tensorboard_costs_no_figures(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = MetricsWriter(tmp_path, done_steps=0, tensorboard=True)
    writer.write("metrics", 1, {"value": 1.0})
    assert writer.board is not None
    events: Any = writer.board._get_file_writer()
    worker = events.event_writer._async_writer._worker
    worker.exception = OSError(28, "No space left on device")  # as its thread leaves it
    writer.write("metrics", 2, {"value": 2.0})
    writer.write("metrics", 3, {"value": 3.0})
    writer.close()
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3]
    assert caplog.text.count("TensorBoard's events cannot be written") == 1
