"""Boxes of a tensor: which elements of a full tensor a rank holds, under any layout.

Pure arithmetic. A tensor-parallel shard is one box of the full tensor (one per block, where blocks
are cut one by one), and the flat range of a shard that a distributed optimizer gives to one rank is
a few boxes of it. Saving writes boxes and loading copies intersections of boxes, so neither needs
to know the layout of the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol


class Cut(Protocol):
    """How a local tensor is cut out of the full one; see `ring_train.model.tensors.Shard`."""

    @property
    def dim(self) -> int: ...  # noqa: D102
    @property
    def world(self) -> int: ...  # noqa: D102
    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def blocks(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor."""

    offset: tuple[int, ...]
    """First index of each dimension."""
    extent: tuple[int, ...]
    """Length of each dimension, not 0."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.extent)

    @property
    def end(self) -> tuple[int, ...]:
        """Index after the last of each dimension."""
        return tuple(o + n for o, n in zip(self.offset, self.extent, strict=True))

    def intersection(self, other: Box) -> Box | None:
        """Return the elements that lie in both, None if there are none."""
        first = tuple(map(max, self.offset, other.offset))
        extent = tuple(e - f for f, e in zip(first, map(min, self.end, other.end), strict=True))
        return Box(first, extent) if all(n > 0 for n in extent) else None

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """Return the index of this box in a tensor that holds the box `outer`."""
        return tuple(
            slice(first - start, last - start)
            for first, last, start in zip(self.offset, self.end, outer.offset, strict=True)
        )


def flat_boxes(shape: tuple[int, ...], start: int, end: int) -> list[Box]:
    """Return the boxes of the elements [start, end) in row-major order, in that order.

    At most 2n - 1 boxes for n dimensions, n >= 1: the rest of a row, whole rows, the begin of one.
    """
    if start >= end:
        return []
    if len(shape) == 1:
        return [Box((start,), (end - start,))]
    row = prod(shape[1:])
    (first, head), (last, tail) = divmod(start, row), divmod(end, row)
    if first == last:
        return _in_row(shape, first, head, tail)
    boxes = []
    if head:
        boxes += _in_row(shape, first, head, row)
        first += 1
    if first < last:
        boxes.append(Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return boxes + _in_row(shape, last, 0, tail)


def _in_row(shape: tuple[int, ...], row: int, start: int, end: int) -> list[Box]:
    inner = flat_boxes(shape[1:], start, end)
    return [Box((row, *box.offset), (1, *box.extent)) for box in inner]


def placed(local: Box, length: int, cut: Cut) -> Iterator[tuple[Box, Box]]:
    """Yield (part of a box of a local tensor, the box of the full tensor that it is).

    Args:
        local: a box of the local tensor.
        length: size of the local tensor along the dimension that is cut.
        cut: how it is cut.
    """
    block_length = length // cut.blocks
    first, last = local.offset[cut.dim], local.end[cut.dim]
    for block in range(cut.blocks):
        low = max(first, block * block_length)
        high = min(last, (block + 1) * block_length)
        if low < high:
            begin = (block * cut.world + cut.rank) * block_length + low - block * block_length
            part = _along(local, cut.dim, low, high - low)
            yield part, _along(local, cut.dim, begin, high - low)


def _along(box: Box, dim: int, offset: int, extent: int) -> Box:
    """Return a box with another place along one dimension."""
    return Box(
        (*box.offset[:dim], offset, *box.offset[dim + 1 :]),
        (*box.extent[:dim], extent, *box.extent[dim + 1 :]),
    )


def tiling_problem(shape: tuple[int, ...], boxes: Iterable[Box]) -> str | None:
    """Return why boxes do not hold each element of a tensor exactly once, None if they do."""
    boxes = sorted(boxes, key=lambda box: box.offset)
    whole = Box(tuple(0 for _ in shape), shape)
    for box in boxes:
        if len(box.offset) != len(shape) or box.intersection(whole) != box:
            return f"the part at {list(box.offset)} of {list(box.extent)} reaches beyond it"
    open_boxes: list[Box] = []
    for box in boxes:
        open_boxes = [other for other in open_boxes if other.end[0] > box.offset[0]]
        for other in open_boxes:
            if box.intersection(other):
                return f"the parts at {list(other.offset)} and {list(box.offset)} overlap"
        open_boxes.append(box)
    held = sum(box.numel for box in boxes)
    return None if held == whole.numel else f"{held} of its {whole.numel} elements are there"
