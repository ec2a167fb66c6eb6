"""Figures of the page: each returns a PNG."""

import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter

from data_pipeline.reporting.records import LedgerEntry, Shards

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D31", "#7F7F7F")
"""Okabe and Ito's, which color-blind people tell apart; repeated after eight."""
GRAY = "#C9CDD2"
MAX_PANELS = 12
DPI = 110
ENGINEERING = EngFormatter(sep="")

type Histogram = dict[int, int]
"""Half octave -> documents."""


def length_histograms(
    panels: Sequence[tuple[str, Histogram, Histogram | None]], unit: str
) -> bytes:
    """Return one panel per domain: documents by length, before (gray) and after.

    Args:
        panels: (domain, after, before or None).
        unit: of the lengths, plural.
    """
    panels = panels[:MAX_PANELS]
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    width = max(6.0, 3.6 * columns + 0.4)  # the title needs that much
    figure = Figure(figsize=(width, 2.5 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    bins = [k for _, after, before in panels for k in (*after, *(before or {}))]
    low, high = min(bins), max(bins) + 1
    for number, (domain, after, before) in enumerate(panels):
        axis = axes.flat[number]
        if before is not None:
            _draw_histogram(axis, before, (low, high), GRAY, "read")
        _draw_histogram(axis, after, (low, high), COLORS[number % len(COLORS)], "kept")
        axis.set_title(domain, fontsize=11, loc="left")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _binary(x)))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(ENGINEERING)
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.tick_params(labelbottom=True)
        _clean(axis)
        if before is not None and number == 0:
            axis.legend(frameon=False, fontsize=9)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel(f"{unit} per document", fontsize=10)
    figure.supylabel("documents", fontsize=10)
    return _png(figure, f"Documents by length in {unit}, bins of half an octave")


def drop_bars(rows: Sequence[tuple[str, str, int]]) -> bytes:
    """Return a bar per (step, reason, documents), in the order given."""
    labels = [f"{step}: {reason}" for step, reason, _ in rows]
    counts = [documents for _, _, documents in rows]
    steps = list(dict.fromkeys(step for step, _, _ in rows))
    colors = [COLORS[steps.index(step) % len(COLORS)] for step, _, _ in rows]
    figure = Figure(figsize=(9, 0.32 * len(rows) + 1.1), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(labels, counts, color=colors, height=0.7)
    axis.bar_label(bars, [f"{count:,}" for count in counts], padding=4, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlabel("documents dropped")
    axis.xaxis.set_major_formatter(ENGINEERING)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.margins(x=0.12)
    _clean(axis)
    return _png(figure, "Documents dropped, by step and reason")


def survival_lines(steps: Sequence[str], remaining: dict[str, list[float]]) -> bytes:
    """Return the share of each domain's documents that remains after each step."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axis = figure.subplots()
    for number, (domain, shares) in enumerate(remaining.items()):
        color = COLORS[number % len(COLORS)]
        style = "-" if number < len(COLORS) else "--"
        values = [100 * share for share in shares]
        axis.plot(range(len(values)), values, style, marker="o", color=color, label=domain)
    axis.set_xticks(range(len(steps)), steps, rotation=25, ha="right")
    axis.set_ylabel("documents that remain, %")
    axis.set_ylim(0, 104)
    axis.grid(axis="y", alpha=0.3)
    _clean(axis)
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return _png(figure, "Documents that remain after each step, by domain")


def shard_bars(shards: Sequence[Shards]) -> bytes:
    """Return documents and tokens per domain side by side."""
    figure = Figure(figsize=(9, 0.42 * len(shards) + 1.1), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = [shard.domain for shard in shards]
    documents = [len(shard.lengths_tokens) for shard in shards]
    tokens = [int(shard.lengths_tokens.sum(dtype=np.int64)) for shard in shards]
    for axis, values, title in zip(
        panels, (documents, tokens), ("documents", "tokens"), strict=True
    ):
        colors = [COLORS[n % len(COLORS)] for n in range(len(names))]
        bars = axis.barh(names, values, color=colors, height=0.7)
        axis.bar_label(bars, [_short_count(v) for v in values], padding=4, fontsize=9)
        axis.set_xlabel(title)
        axis.xaxis.set_major_formatter(ENGINEERING)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axis.margins(x=0.2)
        _clean(axis)
    panels[0].invert_yaxis()
    return _png(figure, "Documents and tokens, by domain")


def ledger_areas(entries: Sequence[LedgerEntry]) -> bytes:
    """Return tokens consumed per domain over steps, and each domain's share between two entries."""
    domains = sorted({domain for entry in entries for domain in entry.tokens})
    steps = np.array([0, *(entry.step for entry in entries)])
    zeros = [[0] * len(domains)]
    counts = np.array(
        zeros + [[entry.tokens.get(domain, 0) for domain in domains] for entry in entries],
        dtype=np.float64,
    )
    colors = [COLORS[n % len(COLORS)] for n in range(len(domains))]
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.stackplot(steps, counts.T, labels=domains, colors=colors)
    above.set_ylabel("tokens consumed")
    above.yaxis.set_major_formatter(ENGINEERING)
    above.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    recent = np.diff(counts, axis=0)
    shares = 100 * recent / np.maximum(recent.sum(axis=1, keepdims=True), 1)
    for column, color in enumerate(colors):
        below.stairs(shares[:, column], steps, color=color, baseline=None, linewidth=1.8)
    below.set_ylabel("share of the tokens\nsince the last entry, %")
    below.set_ylim(0, max(100 * 0.05, 1.08 * float(shares.max(initial=0))))
    below.set_xlabel("optimizer step")
    below.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    below.grid(axis="y", alpha=0.3)
    _mark_phases(above, below, entries)
    for axis in (above, below):
        axis.set_xlim(0, int(steps[-1]) or 1)
        _clean(axis)
    return _png(figure, "Tokens consumed over training, by domain")


def _mark_phases(above: Axes, below: Axes, entries: Sequence[LedgerEntry]) -> None:
    """Draw a line where the phase changes and name the phases above it."""
    last: str | None = None
    boundary = 0
    for entry in entries:
        if entry.phase != last:
            if last is not None:
                for axis in (above, below):
                    axis.axvline(boundary, color="#444444", linewidth=0.8, linestyle=":")
            above.annotate(
                entry.phase,
                (boundary, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=9,
            )
            last = entry.phase
        boundary = entry.step


def half_octaves(lengths: np.ndarray) -> Histogram:
    """Return the number of lengths in each half octave."""
    bins = np.floor(2 * np.log2(np.maximum(lengths, 1))).astype(np.int64)
    values, counts = np.unique(bins, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _draw_histogram(
    axis: Axes, histogram: Histogram, span: tuple[int, int], color: str, label: str
) -> None:
    bins = range(*span)
    edges = [2 ** (k / 2) for k in (*bins, span[1])]
    axis.stairs([histogram.get(k, 0) for k in bins], edges, fill=True, color=color, label=label)


def _short_count(value: float) -> str:
    """Return 1536 as 1.5k."""
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.3g}"


def _binary(value: float) -> str:
    """Return 4096 as 4Ki."""
    for power, suffix in ((30, "Gi"), (20, "Mi"), (10, "Ki")):
        if value >= 2**power:
            return f"{value / 2**power:.3g}{suffix}"
    return f"{value:.3g}"


def _clean(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def _png(figure: Figure, title: str) -> bytes:
    figure.suptitle(title, fontsize=12, x=0.01, ha="left")
    FigureCanvasAgg(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()
