"""Which pipeline stage holds which layers: an even load instead of an even count.

A virtual stage is one model chunk of one pipeline rank, numbered in order of depth: chunk * pp +
rank. Layers of a hybrid stack cost differently, and the last stage also holds the output layer and
the MTP layers, so the split follows the FLOPs of the plan unless it is given by hand.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ring_train.config import Config, ModelConfig, ParallelConfig
from ring_train.plan.cost import BACKWARD_FACTOR, layer_flops, tail_flops
from ring_train.plan.layers import LayerPlan
from ring_train.plan.mesh import Mesh
from ring_train.plan.phases import phase_sizes, ramp_sizes


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """The layers of each virtual stage; embedding on the first, output and MTP on the last."""

    stages: tuple[tuple[int, ...], ...]
    """[pp * vpp] 0-based layer indices of each virtual stage; stage = chunk * pp + rank."""
    stage_flops: tuple[float, ...]
    """[pp * vpp] forward and backward FLOP of one token at the row length of the first phase."""

    def rank_flops(self, pp: int) -> tuple[float, ...]:
        """Return the FLOP per token of each of `pp` pipeline ranks."""
        return tuple(sum(self.stage_flops[rank::pp]) for rank in range(pp))


def make_pipeline(
    model: ModelConfig, parallel: ParallelConfig, layers: LayerPlan, mesh: Mesh, seq_length: int
) -> PipelinePlan:
    """Return the split given by hand, or else the one by cost at a row length in tokens."""
    costs = [
        BACKWARD_FACTOR * layer_flops(model, token, channel, seq_length)
        for token, channel in zip(layers.token_mixers, layers.channel_mixers, strict=True)
    ]
    tail = BACKWARD_FACTOR * tail_flops(model, seq_length)
    counts = parallel.pipeline_layers
    if counts is None:
        counts = balanced_split([round(cost) for cost in costs], round(tail), mesh.pp, mesh.vpp)
    ends = accumulate(counts, initial=0)
    stages = tuple(tuple(range(start, end)) for start, end in pairwise(ends))
    flops = [sum(costs[layer] for layer in stage) for stage in stages]
    flops[-1] += tail
    return PipelinePlan(stages=stages, stage_flops=tuple(flops))


def balanced_split(costs: Sequence[int], tail: int, pp: int, vpp: int = 1) -> list[int]:
    """Return the number of layers of each virtual stage, in order of depth.

    The costliest stage is as cheap as it can be. Of the splits that achieve this, the stages are
    as even as they can be (least squares), earlier stages first; interleaved chunks then move
    single layers as long as that relieves the busiest rank.

    Args:
        costs: of each layer, in order.
        tail: cost of what follows the layers, on the last stage.
        pp: pipeline ranks.
        vpp: chunks of each rank. Every stage has a layer, except that the last may have none.
    """
    limit = _least_limit(costs, tail, pp * vpp)
    counts = _evenest(costs, tail, pp * vpp, limit)
    return _level_ranks(counts, costs, tail, pp, limit) if vpp > 1 else counts


def _least_limit(costs: Sequence[int], tail: int, stages: int) -> int:
    """Return the smallest cost that no stage of some split exceeds."""
    low, high = max(tail, *costs), sum(costs) + tail
    while low < high:
        middle = (low + high) // 2
        if _fits(costs, tail, stages, middle):
            high = middle
        else:
            low = middle + 1
    return low


def _fits(costs: Sequence[int], tail: int, stages: int, limit: int) -> bool:
    """Return whether stages filled in order up to a limit leave the last one within it."""
    layer = 0
    for stage in range(stages - 1):
        last = len(costs) - (stages - 2 - stage)  # leaves one layer to each of the others
        cost, first = 0, layer
        while layer < last and (layer == first or cost + costs[layer] <= limit):
            cost += costs[layer]
            layer += 1
    return sum(costs[layer:]) + tail <= limit


def _evenest(costs: Sequence[int], tail: int, stages: int, limit: int) -> list[int]:
    """Return the split with the least sum of squared stage costs, none of them above a limit."""
    ends = list(accumulate(costs, initial=0))
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # layers so far: squares, counts
    for stage in range(stages):
        is_last = stage == stages - 1
        found: dict[int, tuple[int, list[int]]] = {}
        for end in [len(costs)] if is_last else range(stage + 1, len(costs) + 1):
            for start in range(end if is_last else end - 1, stage - 1, -1):
                cost = ends[end] - ends[start] + is_last * tail
                if cost > limit:
                    break
                squares, counts = best.get(start, (-1, []))
                if squares >= 0 and (end not in found or squares + cost**2 < found[end][0]):
                    found[end] = squares + cost**2, [*counts, end - start]
        best = found
    return best[len(costs)][1]


def _level_ranks(
    counts: list[int], costs: Sequence[int], tail: int, pp: int, limit: int
) -> list[int]:
    """Return a split whose busiest rank no move of one layer to a neighbour relieves."""
    load = _rank_load(counts, costs, tail, pp, limit)
    while True:
        moves = [(_rank_load(move, costs, tail, pp, limit), move) for move in _moves(counts)]
        best = min(moves, default=(load, counts))
        if best[0] >= load:
            return counts
        load, counts = best


def _moves(counts: list[int]) -> Iterator[list[int]]:
    """Yield the splits with one layer moved across one boundary; only the last may be empty."""
    last = len(counts) - 1
    for left in range(last):
        for giver, taker in ((left, left + 1), (left + 1, left)):
            if counts[giver] > (giver != last):
                moved = list(counts)
                moved[giver] -= 1
                moved[taker] += 1
                yield moved


def _rank_load(
    counts: list[int], costs: Sequence[int], tail: int, pp: int, limit: int
) -> tuple[int, int]:
    """Return (cost of the busiest rank, sum of squares); a stage above the limit is the worst."""
    ends = list(accumulate(costs, initial=0))
    stages = [ends[end] - ends[start] for start, end in pairwise(accumulate(counts, initial=0))]
    stages[-1] += tail
    if max(stages) > limit:
        return sum(stages) + 1, 0
    ranks = [sum(stages[rank::pp]) for rank in range(pp)]
    return max(ranks), sum(cost**2 for cost in ranks)


def pipeline_problems(config: Config, mesh: Mesh) -> list[str]:
    """Return what is wrong with the stages and with the schedule that runs them."""
    parallel = config.parallel
    if mesh.vpp > 1 and mesh.pp == 1:
        return [
            f"parallel.virtual_pipeline_model_parallel_size={mesh.vpp} interleaves chunks of "
            "several pipeline ranks, but parallel.pipeline_model_parallel_size=1; set it to null, "
            "or choose pipeline ranks"
        ]
    problems = _split_problems(parallel.pipeline_layers, config.model.num_layers, mesh)
    return problems + (_interleaving_problems(config, mesh) if mesh.vpp > 1 else [])


def _split_problems(given: list[int] | None, num_layers: int, mesh: Mesh) -> list[str]:
    """Return what is wrong with a split by hand, or why there can be none by cost."""
    stages = mesh.pp * mesh.vpp
    product = f"parallel.pipeline_model_parallel_size={mesh.pp} * {mesh.vpp} chunks"
    if given is None:
        if num_layers >= stages - 1:
            return []
        return [
            f"model.num_layers={num_layers} does not give a layer to each stage but the last of "
            f"{product}; choose at most {num_layers + 1} stages"
        ]
    path = f"parallel.pipeline_layers={given}"
    problems = []
    if len(given) != stages:
        problems.append(
            f"{path} names {len(given)} stages, not {product}; give {stages} numbers in order of "
            "depth, or null for a split by cost"
        )
    if sum(given) != num_layers:
        problems.append(
            f"{path} adds up to {sum(given)}, not to model.num_layers={num_layers}; "
            "give every layer to one stage, or null for a split by cost"
        )
    if any(count < 1 for count in given[:-1]) or given[-1:] < [0]:
        problems.append(
            f"{path} leaves a stage without a layer; only the last may have 0, "
            "because it holds the output layer"
        )
    return problems


def _interleaving_problems(config: Config, mesh: Mesh) -> list[str]:
    """Return which micro batches megatron's interleaved schedule cannot arrange: groups of pp."""
    by = (
        f"parallel.pipeline_model_parallel_size={mesh.pp}, which the interleaved pipeline "
        f"(virtual_pipeline_model_parallel_size={mesh.vpp}) needs"
    )
    problems = []
    for sizes in phase_sizes(config):
        rows = sizes.micro_batch_size * mesh.dp
        for key, size in (
            ("global_batch_size", sizes.global_batch_size),
            *(("batch_ramp", size) for size in ramp_sizes(sizes)),
        ):
            if rows > 0 and size % rows == 0 and size // rows % mesh.pp:
                problems.append(
                    f"{sizes.path}.{key}={size} makes {size // rows} micro batches of {rows} rows, "
                    f"not divisible by {by}; choose a multiple of {rows * mesh.pp} rows"
                )
    train = config.train
    if train.eval_interval_steps and train.eval_steps % mesh.pp:
        problems.append(
            f"train.eval_steps={train.eval_steps} micro batches are not divisible by {by}; "
            f"choose a multiple of {mesh.pp}"
        )
    return problems
