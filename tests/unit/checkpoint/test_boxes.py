"""Boxes: flat ranges are tiled exactly, and what one layout saves another loads."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_train.checkpoint.boxes import Box, flat_boxes, placed, tiling_problem


@dataclass(frozen=True)
class Cutting:
    """A `Cut` in numpy."""

    dim: int
    world: int
    rank: int
    blocks: int

    def of(self, full: np.ndarray) -> np.ndarray:
        blocks = np.split(full, self.blocks, self.dim)
        parts = [np.split(block, self.world, self.dim)[self.rank] for block in blocks]
        return np.concatenate(parts, self.dim)


@dataclass(frozen=True)
class Layout:
    """Tensor-parallel ranks, each of which has its flattened part in ranges."""

    dim: int
    world: int
    blocks: int
    cuts: tuple[tuple[float, ...], ...]
    """Where the ranges of each tensor-parallel rank end, as fractions."""

    def ranges(self, full: np.ndarray) -> list[tuple[Cutting, tuple[int, ...], int, int]]:
        """Return (cut, local shape, start, end) of every range."""
        found = []
        for rank in range(self.world):
            cut = Cutting(self.dim, self.world, rank, self.blocks)
            local = cut.of(full)
            inner = (round(x * local.size) for x in self.cuts[rank])
            ends = sorted({0, local.size, *inner})
            found += [(cut, local.shape, start, end) for start, end in pairwise(ends)]
        return found


UNIT = 12
"""Sizes along the cut dimension: divisible by every world times blocks that is drawn."""


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    return tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))


@st.composite
def layouts(draw: st.DrawFn, dim: int) -> Layout:
    world, blocks = draw(st.sampled_from([1, 2, 3, 6])), draw(st.sampled_from([1, 2]))
    fractions = st.lists(st.floats(0, 1), max_size=4).map(tuple)
    return Layout(dim, world, blocks, tuple(draw(fractions) for _ in range(world)))


@st.composite
def pairs_of_layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], Layout, Layout]:
    shape = draw(shapes())
    dim = draw(st.integers(0, len(shape) - 1))
    shape = (*shape[:dim], UNIT * draw(st.integers(1, 2)), *shape[dim + 1 :])
    return shape, draw(layouts(dim)), draw(layouts(dim))


def boxes_of(full: np.ndarray, layout: Layout) -> list[tuple[Box, np.ndarray]]:
    """Return every box that the ranks of a layout hold, with its values."""
    found = []
    for cut, shape, start, end in layout.ranges(full):
        local = cut.of(full)
        for box in flat_boxes(shape, start, end):
            for part, place in placed(box, shape[layout.dim], cut):
                found.append((place, local[part.slices_in(origin(shape))]))
    return found


def origin(shape: tuple[int, ...]) -> Box:
    return Box(tuple(0 for _ in shape), shape)


@settings(deadline=None)
@given(shapes(), st.data())
def test_boxes_tile_a_flat_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, prod(shape)))
    end = data.draw(st.integers(start, prod(shape)))
    values = np.arange(prod(shape)).reshape(shape)
    boxes = flat_boxes(shape, start, end)
    parts = [values[box.slices_in(origin(shape))].ravel() for box in boxes]
    assert np.concatenate([[], *parts]).tolist() == list(range(start, end))
    assert len(boxes) <= 2 * len(shape) - 1


@settings(deadline=None)
@given(pairs_of_layouts())
def test_every_element_saved_under_a_layout_loads_under_another(
    case: tuple[tuple[int, ...], Layout, Layout],
) -> None:
    shape, saved_by, loaded_by = case
    full = np.arange(prod(shape)).reshape(shape)
    stored = boxes_of(full, saved_by)
    assert tiling_problem(shape, [box for box, _ in stored]) is None
    for box, expected in boxes_of(full, loaded_by):
        loaded = np.full(box.extent, -1)
        for place, values in stored:
            common = box.intersection(place)
            if common:
                loaded[common.slices_in(box)] = values[common.slices_in(place)]
        assert np.array_equal(loaded, expected)


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ([Box((0, 0), (2, 3))], None),
        ([Box((0, 0), (1, 3)), Box((1, 0), (1, 3))], None),
        ([Box((0, 0), (1, 3))], "3 of its 6 elements are there"),
        ([], "0 of its 6 elements are there"),
        ([Box((0, 0), (2, 2)), Box((1, 1), (1, 2))], "overlap"),
        ([Box((0, 0), (2, 3)), Box((0, 0), (2, 3))], "overlap"),
        ([Box((0, 0), (2, 4))], "reaches beyond it"),
        ([Box((0, 0), (2, 3)), Box((2, 0), (1, 3))], "reaches beyond it"),
        ([Box((0,), (2,))], "reaches beyond it"),
    ],
)
def test_what_is_no_tiling_is_named(boxes: list[Box], problem: str | None) -> None:
    found: Any = tiling_problem((2, 3), boxes)
    assert found is None if problem is None else problem in found
