"""The pictures of a run: its curves, and those of the modules beside this one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ring_train.plan import Plan
from ring_train.train.heat_map import write_heat_map
from ring_train.train.records import Series, read_series
from ring_train.train.time_plots import write_goodput, write_stragglers

logger = logging.getLogger(__name__)


def write_plots(plan: Plan, rank: int) -> None:
    """Write the pictures of a run that ends. Does nothing but on rank 0.

    A picture that cannot be drawn or written is said, and costs no run its success.
    """
    if rank != 0:
        return
    try:
        draw_run(Path(plan.config.run_dir), plan.cost.num_parameters)
    except (OSError, ValueError) as error:
        logger.warning("a picture could not be made (%s); jobs.plot draws all again", error)


def draw_run(run_dir: Path, num_parameters: int) -> list[Path]:
    """Draw every picture for which a run folder has records; return their paths."""
    title = f"{run_dir.resolve().name}: {num_parameters / 1e6:.1f}M parameters"
    pictures = [
        draw(run_dir, title)
        for draw in (write_curves, write_heat_map, write_goodput, write_stragglers)
    ]
    return [path for path in pictures if path is not None]


def write_curves(run_dir: Path, title: str) -> Path | None:
    """Draw curves.png; return it, None before the first record."""
    metrics, timing, validation, evaluation = (
        read_series(run_dir / f"{name}.jsonl")
        for name in ("metrics", "timing", "validation", "evaluation")
    )
    if not metrics:
        return None
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
    for axis, (name, series) in zip(axes.flat, panels, strict=True):
        _draw(axis, name, series)
    figure.suptitle(title)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    logger.info("wrote %s", path)
    return path


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
