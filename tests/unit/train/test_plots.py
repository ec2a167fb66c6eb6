"""The curves of a run become one picture."""

import json
from pathlib import Path

import pytest

from ring_train.config import compose
from ring_train.plan import Plan, make_plan
from ring_train.train.plots import write_plots


def plan_of(run_dir: Path) -> Plan:
    return make_plan(compose("pretrain", ["model=tiny", f"run_dir={run_dir}"]), 1)


def write_records(run_dir: Path, num_steps: int) -> None:
    records = {
        "metrics": {
            "lm_loss": 5.0,
            "lm_loss/code": 4.0,
            "lm_loss/math": 3.0,
            "mtp_loss/1": 6.0,
            "grad_norm": 1.0,
            "router_layer/max_over_mean/2": 1.5,
        },
        "timing": {"tokens_per_s": 1000.0},
        "validation": {"valid_loss/code": 4.5},
    }
    for name, record in records.items():
        lines = [json.dumps({"step": step, **record}) for step in range(1, num_steps + 1)]
        (run_dir / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("num_steps", [1, 30])
def test_a_png_is_drawn_from_the_records(num_steps: int, tmp_path: Path) -> None:
    write_records(tmp_path, num_steps)
    write_plots(plan_of(tmp_path), rank=0)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(title of the panel, label) of each curve that is drawn."""
    import matplotlib.axes

    drawn = []
    plot = matplotlib.axes.Axes.plot
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "plot",
        lambda axis, *args, **words: (
            drawn.append((axis.get_title(), words["label"])) or plot(axis, *args, **words)
        ),
    )
    return drawn


def test_answers_are_drawn_where_there_are_some(
    tmp_path: Path, drawn: list[tuple[str, str]]
) -> None:
    write_records(tmp_path, 3)
    record = {
        **{"accuracy": 0.5, "accuracy_standard_error": 0.1, "accuracy/math": 0.5},
        **{"entropy_nats": 0.4, "entropy_nats/math": 0.4, "length_tokens": 9.0},
    }
    lines = [json.dumps({"step": step, **record}) for step in (2, 3)]
    (tmp_path / "evaluation.jsonl").write_text("\n".join(lines) + "\n")
    write_plots(plan_of(tmp_path), rank=0)
    assert drawn[-4:] == [
        ("accuracy of answers", "accuracy"),
        ("accuracy of answers", "math"),
        ("entropy of answers (nats)", "entropy_nats"),
        ("entropy of answers (nats)", "math"),
    ]


def test_every_curve_is_drawn(tmp_path: Path, drawn: list[tuple[str, str]]) -> None:
    write_records(tmp_path, 3)
    write_plots(plan_of(tmp_path), rank=0)
    assert drawn == [
        ("training loss by domain (nats)", "code"),
        ("training loss by domain (nats)", "math"),
        ("validation loss by domain (nats)", "code"),
        ("next-token and MTP loss (nats)", "lm_loss"),
        ("next-token and MTP loss (nats)", "1"),
        ("gradient norm", "grad_norm"),
        ("busiest expert / mean, per layer", "2"),
        ("tokens per second", "tokens_per_s"),
    ]


def test_other_ranks_and_runs_without_records_draw_nothing(tmp_path: Path) -> None:
    write_plots(plan_of(tmp_path), rank=0)
    write_records(tmp_path, 3)
    write_plots(plan_of(tmp_path), rank=1)
    assert not list(tmp_path.glob("*.png"))
