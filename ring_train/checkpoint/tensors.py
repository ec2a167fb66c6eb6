"""What this rank holds of the tensors of a checkpoint, by kind and logical name.

Kinds: `weight` (parameters and expert biases), `master` (the fp32 copy of a weight that is not
fp32), `exp_avg` and `exp_avg_sq`, `load` (what the balance loss of the next step reads). This file
alone knows how megatron's three optimizers keep them: with the distributed optimizer a rank has a
flat range of its part of a parameter.
"""

from __future__ import annotations

import ring_train.platform  # noqa: F401  (before the first import of megatron-core)

# isort: split

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    MegatronOptimizer,
)
from megatron.core.process_groups_config import ProcessGroupCollection

from ring_train.checkpoint.boxes import Box, flat_boxes, placed
from ring_train.model.tensors import LocalTensor, Shard, expert_loads, local_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENT_DTYPE = torch.float32

Moments = Mapping[torch.Tensor, Mapping[str, torch.Tensor]]
"""State of an optimizer by the tensor that it updates."""


@dataclass(frozen=True)
class Held:
    """A flat range of this rank's part of a tensor."""

    key: str
    """Kind and logical name."""
    values: torch.Tensor
    """The elements of the range; write through it under no_grad."""
    start: int
    """First element of the range within the flattened local part."""
    local_shape: tuple[int, ...]
    shard: Shard
    """Place of the local part in the full tensor."""
    is_written: bool
    """This rank, of all that hold these elements, saves them."""

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the full tensor."""
        return self.shard.full_shape(torch.Size(self.local_shape))

    def boxes(self) -> Iterator[tuple[Box, torch.Tensor]]:
        """Yield (box of the full tensor, view of the values that it holds)."""
        position, dim = 0, self.shard.dim
        for local in flat_boxes(self.local_shape, self.start, self.start + self.values.numel()):
            view = self.values.narrow(0, position, local.numel).view(local.extent)
            position += local.numel
            for part, full in placed(local, self.local_shape[dim], self.shard):
                yield full, view[part.slices_in(local)]


@dataclass(frozen=True)
class _Optimized:
    """How an optimizer holds a parameter."""

    main: torch.Tensor
    """What the inner optimizer updates: the parameter, its fp32 copy, or a flat range of either."""
    start: int
    has_master: bool
    is_sharded: bool
    """Over data-parallel ranks."""


def held_weights(
    model: Sequence[DistributedDataParallel], groups: ProcessGroupCollection
) -> Iterator[Held]:
    """Yield the weights and expert biases of this rank."""
    items = list(local_tensors(model))
    written = _written(items, groups)
    for item in items:
        yield _held("weight", item, item.tensor, 0, is_written=id(item) in written)


def held_loads(
    model: Sequence[DistributedDataParallel], groups: ProcessGroupCollection
) -> Iterator[Held]:
    """Yield the expert loads that the next step's balance loss reads; none without that loss."""
    items = list(expert_loads(model))
    written = _written(items, groups)
    for item in items:
        yield _held("load", item, item.tensor, 0, is_written=id(item) in written)


def held_state(
    model: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    groups: ProcessGroupCollection,
    moments: Moments,
) -> Iterator[Held]:
    """Yield what this rank holds of masters and of the given moments."""
    items = list(local_tensors(model))
    written = _written(items, groups)
    optimized = _optimized(optimizer)
    for item in items:
        entry = optimized.get(item.owner)
        if entry is None:
            continue
        is_written = id(item) in written
        if entry.is_sharded:
            is_written = not item.is_copy and _is_first_replica_over_tp(item, groups)
        kinds = {"master": entry.main} if entry.has_master else {}
        kinds |= {k: v for k, v in moments.get(entry.main, {}).items() if k in MOMENTS}
        # What this rank updates of the owner may begin and end anywhere within the item.
        first = max(item.start, entry.start)
        last = min(item.start + item.tensor.numel(), entry.start + entry.main.numel())
        if first < last:
            for kind, state in kinds.items():
                values = state.detach().view(-1)[first - entry.start : last - entry.start]
                yield _held(kind, item, values, first - item.start, is_written=is_written)


def _held(
    kind: str, item: LocalTensor, values: torch.Tensor, start: int, *, is_written: bool
) -> Held:
    shape = tuple(item.tensor.shape)
    flat = values.detach().view(-1)
    return Held(f"{kind}/{item.name}", flat, start, shape, item.shard, is_written)


def current_moments(optimizer: MegatronOptimizer) -> Moments:
    """Return the moments that an optimizer has: none before its first step."""
    return {
        main: state
        for part in _parts(optimizer)
        for main, state in part.optimizer.state.items()
        if state
    }


def new_moments(optimizer: MegatronOptimizer) -> Moments:
    """Return uninitialised moments for everything that an optimizer updates."""
    return {
        entry.main: {kind: torch.empty_like(entry.main, dtype=MOMENT_DTYPE) for kind in MOMENTS}
        for entry in _optimized(optimizer).values()
    }


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Return the number of updates made, which bias correction depends on."""
    steps = set()
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            if isinstance(part.optimizer, torch.optim.Adam):
                states = [part.optimizer.state[main] for main in group["params"]]
                steps |= {int(state["step"]) if state else 0 for state in states}
            elif group["params"]:
                steps.add(int(group.get("step", 0)))
    assert len(steps) <= 1, f"parameters were updated {sorted(steps)} times"
    return max(steps, default=0)


def set_state(optimizer: MegatronOptimizer, moments: Moments, step: int) -> None:
    """Give an optimizer moments and the number of updates; no moments stand for no update yet."""
    for part in _parts(optimizer):
        inner = part.optimizer
        inner.state.clear()
        for group in inner.param_groups:
            for main in group["params"]:
                if main in moments:
                    inner.state[main] = dict(moments[main])
            if not step:
                group.pop("step", None)
            elif isinstance(inner, torch.optim.Adam):
                for main in group["params"]:
                    inner.state[main]["step"] = torch.tensor(float(step))
            else:
                group["step"] = step


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Return megatron's optimizers that update something on this rank."""
    chained = isinstance(optimizer, ChainedOptimizer)
    parts: list[Any] = optimizer.chained_optimizers if chained else [optimizer]
    return [part for part in parts if not part.is_stub_optimizer]


def _optimized(optimizer: MegatronOptimizer) -> dict[torch.Tensor, _Optimized]:
    """Return what this rank updates, by parameter of the model."""
    found = {}
    for part in _parts(optimizer):
        sharded = isinstance(part, DistributedOptimizer)
        for parameter, main, has_master in _pairs(part):
            start = part._get_model_param_range_map(parameter)["param"].start if sharded else 0
            found[parameter] = _Optimized(main, start, has_master, sharded)
    return found


def _pairs(part: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Yield (parameter, what the inner optimizer updates, whether that is an fp32 copy)."""
    if isinstance(part, DistributedOptimizer):
        groups = [
            (part.model_float16_groups, part.shard_fp32_from_float16_groups, True),
            (part.model_fp32_groups, part.shard_fp32_groups, False),
        ]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        groups = [
            (part.float16_groups, part.fp32_from_float16_groups, True),
            (part.fp32_from_fp32_groups, part.fp32_from_fp32_groups, False),
        ]
    else:
        parameters = [group["params"] for group in part.optimizer.param_groups]
        groups = [(parameters, parameters, False)]
    for parameter_groups, main_groups, has_master in groups:
        for parameters, mains in zip(parameter_groups, main_groups, strict=True):
            for parameter, main in zip(parameters, mains, strict=True):
                yield parameter, main, has_master


def _written(items: Sequence[LocalTensor], groups: ProcessGroupCollection) -> set[int]:
    """Return the ids of the items that this rank saves: an equal share of what it has in common.

    Every rank that holds the same elements comes to the same division without asking.
    """
    written: set[int] = set()
    loads: dict[tuple[bool, bool], list[tuple[int, int]]] = {}
    for item in sorted(items, key=lambda item: (-item.tensor.numel(), item.name)):
        if item.is_copy:
            continue
        tp, dp = _tp_and_dp(item, groups)
        is_cut = item.shard.world == tp.size()
        replica = dp.rank() if is_cut else tp.rank() + tp.size() * dp.rank()
        count = dp.size() if is_cut else tp.size() * dp.size()
        load = loads.setdefault((".experts." in item.name, is_cut), [(0, r) for r in range(count)])
        num_elements, writer = load[0]
        heapq.heapreplace(load, (num_elements + item.tensor.numel(), writer))
        if writer == replica:
            written.add(id(item))
    return written


def _tp_and_dp(
    item: LocalTensor, groups: ProcessGroupCollection
) -> tuple[torch.distributed.ProcessGroup, torch.distributed.ProcessGroup]:
    """Return the groups over which a tensor may be cut and over which it is replicated."""
    if ".experts." in item.name:
        return groups.expt_tp, groups.expt_dp
    return groups.tp, groups.dp_cp


def _is_first_replica_over_tp(item: LocalTensor, groups: ProcessGroupCollection) -> bool:
    tp, _ = _tp_and_dp(item, groups)
    return item.shard.world == tp.size() or tp.rank() == 0
