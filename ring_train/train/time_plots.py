"""Where the time of a run went and which ranks are slow, as pictures."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ring_train.resilience.goodput import CAUSES, SECOND, Account, make_account, ordered
from ring_train.resilience.journal import read_journal
from ring_train.train.records import read_records

logger = logging.getLogger(__name__)

STRAGGLERS_FILE = "stragglers.jsonl"
GOOD, LOST, NEUTRAL = "#2a7f4f", "#b2182b", "#5b7fa6"
LOST_CAUSES = ("redone", "skipped", "roll_back", "hang", "unknown", "down")
MAX_RANKS = 16
"""Of the slowest, for which bars are drawn."""
MAX_COLUMNS = 400
UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def write_goodput(run_dir: Path, title: str) -> Path | None:
    """Draw goodput.png from the journal; return it, None without one."""
    events = [event for event in read_journal(run_dir) if "time" in event]
    account = make_account(events)
    if not account.total_us:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (over_time, bars) = pyplot.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    _draw_steps(over_time, events, account)
    _draw_parts(bars, account)
    figure.suptitle(f"{title}, goodput {account.goodput or 0:.1%}")
    path = run_dir / "goodput.png"
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    logger.info("wrote %s", path)
    return path


def _draw_steps(axis: Any, events: Sequence[Mapping[str, Any]], account: Account) -> None:
    """Draw steps done over wall time, with starts and what ended them."""
    begin, end = account.attempts[0].started, account.attempts[-1].ended
    unit_s, unit = next((u for u in UNITS if end - begin >= 3 * u[0]), UNITS[-1])
    for attempt in account.attempts:
        marks = [_mark(event) for event in events if event.get("attempt") == attempt.number]
        times = [(mark[0] - begin) / unit_s for mark in marks if mark]
        steps = [mark[1] for mark in marks if mark]
        axis.plot(times, steps, color=GOOD, marker="." if len(times) < 50 else None)
        is_bad = attempt.ending in ("failed", "hung", "killed")
        if times and attempt is not account.attempts[-1]:
            axis.plot(
                *([(attempt.ended - begin) / unit_s], [steps[-1]]),
                marker="x" if is_bad else "s",
                color=LOST if is_bad else NEUTRAL,
            )
    for before, after in zip(account.attempts, account.attempts[1:], strict=False):
        down = ((before.ended - begin) / unit_s, (after.started - begin) / unit_s)
        axis.axvspan(*down, color=LOST, alpha=0.12, linewidth=0)
    axis.set_title(f"steps done; {len(account.attempts)} starts (x: failure, square: stop)")
    axis.set_xlabel(f"{unit} since the first start (red: down)")
    axis.set_ylabel("step")
    axis.grid(alpha=0.3)


def _mark(event: Mapping[str, Any]) -> tuple[float, int] | None:
    """Return (time, steps done) of an event that says so."""
    if event["event"] not in ("init", "resume", "progress", "roll_back", "rolled_back"):
        return None
    step = 0 if event["event"] == "init" else event.get("from_step", event.get("step"))
    return (event["time"], step) if isinstance(step, int) else None


def _draw_parts(axis: Any, account: Account) -> None:
    """Draw a bar per cause."""
    parts = ordered(account.parts_us)
    shares = [us / account.total_us for us in parts.values()]
    colours = [
        GOOD if cause == "productive" else LOST if cause in LOST_CAUSES else NEUTRAL
        for cause in parts
    ]
    axis.barh(range(len(parts)), shares, color=colours)
    labels = [f"{cause}: {CAUSES[cause]}" if cause in CAUSES else cause for cause in parts]
    axis.set_yticks(range(len(parts)), labels, fontsize=8)
    axis.invert_yaxis()
    for place, (share, us) in enumerate(zip(shares, parts.values(), strict=True)):
        axis.text(share, place, f" {share:.1%}, {us / SECOND:,.0f} s", va="center", fontsize=8)
    axis.set_xlim(0, max(shares) * 1.3)
    axis.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.set_title("share of wall time")


def read_step_seconds(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Return ([records] steps, [records, ranks] own seconds) for the newest number of ranks."""
    records = [r for r in read_records(path) if isinstance(r.get("step_s"), list)]
    rows = [r for r in records if len(r["step_s"]) == len(records[-1]["step_s"])]
    # NaN stands for a rank without a measured step.
    values = [[math.nan if v is None else v for v in row["step_s"]] for row in rows]
    if not values or not values[0]:
        return None
    return np.array([row["step"] for row in rows]), np.array(values, dtype=float)


def write_stragglers(run_dir: Path, title: str) -> Path | None:
    """Draw stragglers.png from stragglers.jsonl; return it, None for a single rank."""
    found = read_step_seconds(run_dir / STRAGGLERS_FILE)
    if found is None or found[1].shape[1] < 2 or np.isnan(found[1]).all():
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps, seconds = found
    figure, (over_time, bars) = pyplot.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    edges = np.linspace(0, len(steps), min(len(steps), MAX_COLUMNS) + 1).astype(int)[:-1]
    # Steps differ, ranks should not: each is held against the median rank of the same step.
    relative = seconds / np.nanquantile(seconds, 0.5, axis=1, keepdims=True, method="lower")
    picture = over_time.imshow(
        np.maximum.reduceat(np.nan_to_num(relative, nan=1.0), edges, axis=0).T,
        **{"aspect": "auto", "interpolation": "nearest", "cmap": "Reds", "vmin": 1.0, "vmax": 2.0},
        extent=(steps[0] - 0.5, steps[-1] + 0.5, seconds.shape[1] - 0.5, -0.5),
    )
    figure.colorbar(picture, ax=over_time, label="own seconds / median rank", extend="max")
    over_time.set_title("own seconds of each rank over the median rank of that step")
    over_time.set_xlabel("step")
    over_time.set_ylabel("rank")
    over_time.yaxis.get_major_locator().set_params(integer=True)
    _draw_slowest(bars, seconds)
    figure.suptitle(title)
    path = run_dir / "stragglers.png"
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    logger.info("wrote %s", path)
    return path


def _draw_slowest(axis: Any, seconds: np.ndarray) -> None:
    """Draw a bar for the mean of each of the slowest ranks."""
    measured = ~np.isnan(seconds)
    means = np.where(measured, seconds, 0.0).sum(0) / np.maximum(measured.sum(0), 1)
    slowest = np.argsort(-means)[:MAX_RANKS]
    median = statistics.median_low(means[measured.any(0)].tolist())
    colours = [LOST if means[rank] > 1.1 * median else NEUTRAL for rank in slowest]
    axis.barh(range(len(slowest)), means[slowest], color=colours)
    axis.set_yticks(range(len(slowest)), [f"rank {rank}" for rank in slowest], fontsize=8)
    axis.axvline(median, color="black", linewidth=1)
    axis.invert_yaxis()
    axis.set_xlabel("mean own seconds of a step (line: median rank)")
    axis.set_title(f"the slowest {len(slowest)} of {len(means)} ranks")
