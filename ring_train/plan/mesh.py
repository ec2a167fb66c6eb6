"""How ranks are divided among the kinds of parallelism."""

from dataclasses import dataclass
from math import lcm

from ring_train.config import ParallelConfig
from ring_train.plan.problems import indivisible

DEGREES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "context_parallel_size",
)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Degrees of parallelism; tp * cp * pp * dp == etp * ep * pp * edp == world_size."""

    world_size: int
    tp: int
    pp: int
    vpp: int
    """Model chunks per pipeline rank; 1 = no interleaving."""
    ep: int
    etp: int
    cp: int
    dp: int
    edp: int
    """Data-parallel degree of routed experts."""
    sequence_parallel: bool


def make_mesh(parallel: ParallelConfig, world_size: int) -> Mesh:
    """Return the degrees, derived ones rounded down where `mesh_problems` objects."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
    cp, sp = parallel.context_parallel_size, parallel.sequence_parallel
    return Mesh(
        world_size=world_size,
        tp=tp,
        pp=pp,
        vpp=parallel.virtual_pipeline_model_parallel_size or 1,
        ep=ep,
        etp=etp,
        cp=cp,
        dp=max(1, world_size // (tp * pp * cp)),
        edp=max(1, world_size // (etp * ep * pp)),
        sequence_parallel=tp > 1 if sp is None else sp,
    )


def smallest_world(parallel: ParallelConfig) -> int:
    """Return the fewest ranks that hold the given degrees."""
    dense, expert = _dense_ranks(parallel), _expert_ranks(parallel)
    return lcm(dense, expert) if dense > 0 and expert > 0 else 1


def mesh_problems(parallel: ParallelConfig, world_size: int) -> list[str]:
    """Return what is wrong with positive degrees, the model left aside."""
    problems = []
    if world_size % _dense_ranks(parallel):
        problems.append(
            f"world_size={world_size} is not divisible by "
            f"tensor_model_parallel_size * pipeline_model_parallel_size * context_parallel_size="
            f"{_dense_ranks(parallel)}; start a multiple of {smallest_world(parallel)} ranks"
        )
    if world_size % _expert_ranks(parallel):
        problems.append(
            f"world_size={world_size} is not divisible by "
            f"expert_tensor_parallel_size * expert_model_parallel_size * "
            f"pipeline_model_parallel_size={_expert_ranks(parallel)}; "
            f"start a multiple of {smallest_world(parallel)} ranks"
        )
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        problems.append(
            "parallel.sequence_parallel=True shards over tensor-parallel ranks, but "
            "parallel.tensor_model_parallel_size=1; leave sequence_parallel at null"
        )
    return problems + _overlap_problems(parallel)


def _overlap_problems(parallel: ParallelConfig) -> list[str]:
    """Return what overlap_param_gather lacks: sharded updates, and buckets to gather them by."""
    if not parallel.overlap_param_gather:
        return []
    return [
        f"parallel.overlap_param_gather=True gathers {what}, but parallel.{key}=False; "
        f"set parallel.{key}=true, or overlap_param_gather=false"
        for key, what in (
            ("use_distributed_optimizer", "parameters that ranks have updated in shards"),
            ("overlap_grad_reduce", "the buckets of the gradient reduction"),
        )
        if not getattr(parallel, key)
    ]


def tensor_split_problems(sizes: dict[str, int], tp: int) -> list[str]:
    """Return a problem for each named size that tensor parallelism cannot split evenly."""
    by = "parallel.tensor_model_parallel_size"
    return [line for key, size in sizes.items() for line in indivisible(key, size, by, tp)]


def _dense_ranks(parallel: ParallelConfig) -> int:
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def _expert_ranks(parallel: ParallelConfig) -> int:
    return (
        parallel.expert_tensor_parallel_size
        * parallel.expert_model_parallel_size
        * parallel.pipeline_model_parallel_size
    )
