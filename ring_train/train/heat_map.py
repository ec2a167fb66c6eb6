"""How routers use their experts, as a picture: experts x layers, and each layer over time.

Colours are the logarithm to base 2 of an expert's tokens over the mean of its layer: white is
balanced, each unit of red doubles, each of blue halves. Black has not seen one token.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ring_train.train.records import read_records

logger = logging.getLogger(__name__)

LOADS_FILE = "loads.jsonl"
PICTURE = "experts.png"
LIMIT = 2.0
"""Doublings at which colours end."""
MAX_PANELS = 12
"""Layers that are shown over time; of more, as many are taken evenly."""
MAX_COLUMNS = 400
"""Records that are shown over time; of more, neighbours are added up."""
RECENT_SHARE = 0.1
"""Of the records, which are added up for the picture of the end."""
CELL_PIXELS = 8
"""Of an expert in the image for TensorBoard."""
DEAD = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Loads:
    """Tokens per expert at the logged steps of a run."""

    steps: np.ndarray
    """[steps] int"""
    layers: tuple[int, ...]
    """1-based; MTP depths count on from the last layer."""
    counts: np.ndarray
    """[steps, layers, experts] float"""


def read_loads(path: Path) -> Loads | None:
    """Return the loads that a run has logged; None if there are none."""
    records = [record for record in read_records(path) if isinstance(record.get("layers"), Mapping)]
    if not records:
        return None
    # A run has the same routers at every step; a record that differs is damaged.
    layers = sorted(records[-1]["layers"], key=int)
    width = max((len(counts) for counts in records[-1]["layers"].values()), default=0)
    whole = [r for r in records if _has(r["layers"], layers, width)]
    if not whole:
        return None
    return Loads(
        np.array([record["step"] for record in whole]),
        tuple(int(layer) for layer in layers),
        np.array([[r["layers"][layer] for layer in layers] for r in whole], dtype=float),
    )


def _has(counts: Mapping[str, Any], layers: Sequence[str], width: int) -> bool:
    return sorted(counts, key=int) == layers and all(len(counts[key]) == width for key in layers)


def doublings(counts: np.ndarray) -> np.ndarray:
    """Return log2(count / mean over the last axis); -inf for an expert without a token."""
    mean = counts.mean(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log2(counts / np.where(mean > 0, mean, 1))


def colours(values: np.ndarray) -> np.ndarray:
    """Return [..., 3] RGB in 0 to 1 of doublings: blue, white, red; black for -inf."""
    share = np.clip(values / LIMIT, -1, 1)
    ends = np.array([[0.13, 0.40, 0.67], [0.70, 0.09, 0.17]])
    strength = np.abs(share)[..., None]
    tint = np.where(share[..., None] < 0, ends[0], ends[1])
    return np.where(np.isneginf(values)[..., None], DEAD, 1 - strength * (1 - tint))


def load_image(layers: Mapping[int, Sequence[int]]) -> np.ndarray:
    """Return one step as [layers x cell, experts x cell, 3] uint8: a row of cells per layer."""
    counts = np.array([layers[number] for number in sorted(layers)], dtype=float)
    rgb = (colours(doublings(counts)) * 255).round().astype(np.uint8)
    return rgb.repeat(CELL_PIXELS, axis=0).repeat(CELL_PIXELS, axis=1)


def write_heat_map(run_dir: Path, title: str) -> Path | None:
    """Draw experts.png from loads.jsonl; return it, None for a run without routers."""
    loads = read_loads(run_dir / LOADS_FILE)
    if loads is None:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = _evenly(len(loads.layers), MAX_PANELS)
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = pyplot.figure(figsize=(max(3.6 * columns, 11), 3.4 + 2.2 * rows), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.0, 2.2 * rows])
    top, bottom = parts
    _draw_layers(top, loads)
    axes = bottom.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    steps, counts = _in_columns(loads)
    for axis, layer in zip(axes.flat, shown, strict=False):
        _draw_over_time(axis, steps, counts[:, layer], f"layer {loads.layers[layer]}")
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("expert")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(f"{title}: tokens of each expert over the mean of its layer (black: none)")
    path = run_dir / PICTURE
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    logger.info("wrote %s", path)
    return path


def _evenly(length: int, at_most: int) -> list[int]:
    """Return at most so many indices, the first and the last among them."""
    count = min(length, at_most)
    return sorted({round(i * (length - 1) / max(count - 1, 1)) for i in range(count)})


def _in_columns(loads: Loads) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and counts with neighbours added up to at most MAX_COLUMNS."""
    edges = np.linspace(0, len(loads.steps), min(len(loads.steps), MAX_COLUMNS) + 1).astype(int)
    counts = np.add.reduceat(loads.counts, edges[:-1], axis=0)
    return loads.steps[edges[1:] - 1], counts


def _draw_layers(figure: Any, loads: Loads) -> None:
    """Draw experts x layers at the beginning, in the middle and at the end."""
    size = max(1, round(len(loads.steps) * RECENT_SHARE))
    begins = [0, (len(loads.steps) - size) // 2, len(loads.steps) - size]
    windows = sorted({begin: loads.steps[begin : begin + size] for begin in begins}.items())
    axes = figure.subplots(1, len(windows), squeeze=False, sharey=True)[0]
    for axis, (begin, steps) in zip(axes, windows, strict=True):
        counts = loads.counts[begin : begin + size].sum(0)
        axis.imshow(colours(doublings(counts)), aspect="auto", interpolation="nearest")
        at = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
        axis.set_title(at, fontsize=10)
        axis.set_xlabel("expert")
        shown = _evenly(len(loads.layers), 16)
        axis.set_yticks(shown, [str(loads.layers[i]) for i in shown])
    axes[0].set_ylabel("layer")
    _draw_key(figure, axes)


def _draw_key(figure: Any, axes: Any) -> None:
    """Draw which colour means what."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    levels = np.linspace(-LIMIT, LIMIT, 101)
    scale = ScalarMappable(Normalize(-LIMIT, LIMIT), ListedColormap(colours(levels)))
    bar = figure.colorbar(scale, ax=list(axes), ticks=[-2, -1, 0, 1, 2], pad=0.02)
    bar.ax.set_yticklabels(["1/4 or less", "1/2", "mean", "2 x", "4 x or more"])


def _draw_over_time(axis: Any, steps: np.ndarray, counts: np.ndarray, title: str) -> None:
    """Draw one layer: a row per expert, a column per logged step."""
    picture = colours(doublings(counts)).swapaxes(0, 1)
    half = (steps[-1] - steps[0]) / max(len(steps) - 1, 1) / 2 or 0.5
    extent = (steps[0] - half, steps[-1] + half, counts.shape[1] - 0.5, -0.5)
    axis.imshow(picture, aspect="auto", interpolation="nearest", extent=extent)
    axis.set_title(title, fontsize=10)
