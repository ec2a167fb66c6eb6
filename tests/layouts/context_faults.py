"""Faults of context parallelism; see tests.layouts.mutants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

Patches = list[Any]


def _with_batches(change: Callable[[Any, Any], Any]) -> Patches:
    """Change what `context_parts` (or its absence) hands to the model: change(batch, groups)."""
    from ring_train.train import step

    original = step.context_parts

    def parts(batches: Any, groups: Any) -> Any:
        return [change(batch, groups) for batch in original(batches, groups)]

    return [mock.patch.object(step, "context_parts", parts)]


def mtp_tokens_shifted_by_one_on_later_ranks() -> Patches:
    def change(batch: Any, groups: Any) -> Any:
        return replace(batch, mtp_tokens=batch.mtp_tokens.roll(groups.cp.rank(), -1))

    return _with_batches(change)


def positions_restart_on_each_rank() -> Patches:
    def change(batch: Any, groups: Any) -> Any:
        first = batch.position_ids[0]
        return replace(batch, position_ids=(batch.position_ids - first).clamp(min=0))

    return _with_batches(change)


def labels_cut_without_zigzag() -> Patches:
    from ring_train.train import step

    original = step.context_parts

    def parts(batches: Any, groups: Any) -> Any:
        cp, rank = groups.cp.size(), groups.cp.rank()
        return [
            replace(part, labels=batch.labels.chunk(cp)[rank])
            for part, batch in zip(original(batches, groups), batches, strict=True)
        ]

    return [mock.patch.object(step, "context_parts", parts)]


def _with_rows(**changes: Callable[[Any], Any]) -> Patches:
    """Change fields of the context row that both mixers read."""
    from ring_train.model import documents

    original = documents.make_context_row

    def make(*args: Any) -> Any:
        row = original(*args)
        return replace(row, **{name: change(row) for name, change in changes.items()})

    return [mock.patch.object(documents, "make_context_row", make)]


def _distances(change: Callable[[int, int, int | None], int | None]) -> Patches:
    def changed(row: Any) -> Any:
        return tuple(
            tuple(change(i, j, distance) for j, distance in enumerate(distances))
            for i, distances in enumerate(row.distances)
        )

    return _with_rows(distances=changed)


def state_decays_one_token_too_much() -> Patches:
    return _distances(lambda i, j, distance: None if distance is None else distance + 1)


def state_does_not_cross_ranks() -> Patches:
    return _distances(lambda i, j, distance: None)


def state_passes_one_seam_only() -> Patches:
    return _distances(lambda i, j, distance: distance if j == i + 1 else None)


def state_leaks_into_the_next_document() -> Patches:
    def changed(row: Any) -> Any:
        starts = row.segments
        return tuple(
            tuple(starts[j][0] - starts[i][1] if j > i else None for j in range(len(starts)))
            for i in range(len(starts))
        )

    return _with_rows(distances=changed)


def no_gradient_through_the_state() -> Patches:
    from ring_train.model import context

    def backward(ctx: Any, grad: Any) -> Any:
        return grad * 0, None, None, None

    return [mock.patch.object(context._Exchange, "backward", staticmethod(backward))]


def gradients_of_keys_stay_on_their_rank() -> Patches:
    from ring_train.model import context

    def own_only(segments: Any, row: Any, group: Any) -> Any:
        return segments[list(row.own)]

    return [mock.patch.object(context, "_sum_segments", own_only)]


def keys_in_the_order_of_ranks() -> Patches:
    from ring_train.plan.context import ContextRow

    count = property(lambda row: tuple(range(len(row.segments))))
    return [mock.patch.object(ContextRow, "by_rank", count)]
