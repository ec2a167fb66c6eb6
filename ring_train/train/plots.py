"""The curves of a run as one PNG."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ring_train.plan import Plan

logger = logging.getLogger(__name__)

Series = dict[str, tuple[list[int], list[float]]]


def write_plots(plan: Plan, rank: int) -> None:
    """Write `curves.png` from the records of the run folder. Does nothing but on rank 0."""
    if rank != 0:
        return
    run_dir = Path(plan.config.run_dir)
    metrics, timing, validation, evaluation = (
        _read_series(run_dir / f"{name}.jsonl")
        for name in ("metrics", "timing", "validation", "evaluation")
    )
    if not metrics:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, Series]] = [
        ("training loss by domain (nats)", _select(metrics, "lm_loss/")),
        ("validation loss by domain (nats)", _select(validation, "valid_loss/")),
        ("next-token and MTP loss (nats)", _select(metrics, "lm_loss", "mtp_loss/", exact=True)),
        ("gradient norm", _select(metrics, "grad_norm", exact=True)),
        ("busiest expert / mean, per layer", _select(metrics, "router_layer/max_over_mean/")),
        ("tokens per second", _select(timing, "tokens_per_s", exact=True)),
    ]
    if evaluation:
        panels += [
            ("accuracy of answers", _select(evaluation, "accuracy", "accuracy/", exact=True)),
            (
                "entropy of answers (nats)",
                _select(evaluation, "entropy_nats", "entropy_nats/", exact=True),
            ),
        ]
    columns = len(panels) // 2
    figure, axes = pyplot.subplots(2, columns, figsize=(5 * columns, 8), layout="constrained")
    for axis, (title, series) in zip(axes.flat, panels, strict=True):
        _draw(axis, title, series)
    figure.suptitle(f"{run_dir.name}: {plan.cost.num_parameters / 1e6:.1f}M parameters")
    figure.savefig(run_dir / "curves.png", dpi=100)
    pyplot.close(figure)
    logger.info("wrote %s", run_dir / "curves.png")


def _read_series(path: Path) -> Series:
    """Return {key: (steps, values)} of a JSON-lines file of records."""
    series: Series = {}
    if path.exists():
        for line in path.read_text().splitlines():
            record = json.loads(line)
            step = record.pop("step")
            for key, value in record.items():
                steps, values = series.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    return series


def _select(series: Series, *wanted: str, exact: bool = False) -> Series:
    """Return the series whose key starts with a wanted prefix; `exact`: or is the wanted key."""
    return {
        key: values
        for key, values in series.items()
        if any(
            key == name or (key.startswith(name) and (name.endswith("/") or not exact))
            for name in wanted
        )
    }


def _draw(axis: Any, title: str, series: Series) -> None:
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    for key, (steps, values) in series.items():
        marker = "o" if len(steps) < 20 else None
        axis.plot(steps, values, label=key.rsplit("/", 1)[-1], linewidth=1, marker=marker)
    if 1 < len(series) <= 12:
        axis.legend(fontsize=7, ncols=2)
