"""The picture of a soak: step, memory and handles over time, with the faults."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.chaos.soak_report import Soak

MARKS = {"kill": "tab:red", "freeze": "tab:purple", "preempt": "tab:gray"}
MB = 1e6


def draw(soak: Soak, path: Path) -> None:
    """Draw a soak into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 1, figsize=(11, 9), sharex=True, layout="constrained")
    _draw_steps(soak, axes[0])
    for axis, key, scale, title in (
        (axes[1], "private_bytes", MB, "private memory of each rank, MB"),
        (axes[2], "handles", 1.0, "open file handles of each rank"),
    ):
        for rank in soak.ranks:
            mine = [sample for sample in soak.samples if sample["rank"] == rank]
            minutes = [sample["after_s"] / 60 for sample in mine]
            values = [sample[key] / scale for sample in mine]
            axis.plot(minutes, values, ".", markersize=2, label=f"rank {rank}")
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=8, loc="lower right")
    axes[2].set_xlabel("minutes")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _draw_steps(soak: Soak, axis: Any) -> None:
    told = soak.named("resume", "init", "progress")
    minutes = [(event["time"] - soak.began) / 60 for event in told]
    axis.plot(minutes, [event["step"] for event in told], color="tab:blue", linewidth=1)
    for kind, color in MARKS.items():
        at = [fault["after_s"] / 60 for fault in soak.faults if fault["kind"] == kind]
        for index, minute in enumerate(at):
            label = None if index else f"{kind} ({len(at)})"
            axis.axvline(minute, color=color, linewidth=0.8, alpha=0.7, label=label)
    axis.set_title("steps done, and faults from outside", fontsize=10)
    if soak.faults:
        axis.legend(fontsize=8, loc="lower right")
