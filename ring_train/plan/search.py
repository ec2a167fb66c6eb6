"""The fastest layouts of a run that fit the machine: enumerate, drop what is illegal or too large.

A layout is simulated only if the time without pipeline bubbles, which nothing can undercut, is
among the best so far; so no layout that was left out is faster than one that is returned.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ring_train.config import Config, MachineConfig, RecomputeGranularity, RecomputeMethod
from ring_train.plan.coverage import coverage_problems
from ring_train.plan.layers import channel_mixers
from ring_train.plan.memory import GIB, RankMemory, make_memory, worst
from ring_train.plan.mesh import make_mesh, mesh_problems
from ring_train.plan.plan import Plan, make_plan
from ring_train.plan.problems import PlanError
from ring_train.plan.timing import Timing, make_timing, step_bound_s

RECOMPUTATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"recompute_granularity": RecomputeGranularity.selective, "recompute_modules": ["core_attn"]},
    {"recompute_granularity": RecomputeGranularity.selective, "recompute_modules": ["moe"]},
    {
        "recompute_granularity": RecomputeGranularity.full,
        "recompute_method": RecomputeMethod.uniform,
        "recompute_num_layers": 1,
    },
)
MICRO_BATCHES = (1, 2, 4)
CHUNKS = (None, 2)
LONG_ROW = 16384
"""Tokens of a row from which context parallelism is tried."""
NO_RECOMPUTATION: dict[str, Any] = {
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "recompute_modules": [],
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to run, and what it is predicted to do."""

    plan: Plan
    memory: RankMemory
    """Of the worst pipeline rank."""
    timing: Timing

    @property
    def overrides(self) -> list[str]:
        """The words that choose it, after those that were searched with."""
        return layout_words(self.plan.config)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The result of a search."""

    layouts: list[Layout]
    """Fastest first."""
    num_legal: int
    num_fitting: int
    closest: tuple[Plan, RankMemory] | None
    """Of those that do not fit, the one that needs least."""


def search(config: Config, world_size: int, best: int) -> Found:
    """Return the `best` fastest layouts on a number of ranks.

    Raises:
        PlanError: no layout is legal whatever its memory, with what is wrong with the last tried.
    """
    limit = config.machine.memory_gib * GIB
    fitting: list[tuple[float, Plan, RankMemory]] = []
    closest: tuple[Plan, RankMemory] | None = None
    num_legal = 0
    problems = [f"world_size={world_size} divides into no layout of this model"]
    for candidate in _meshes(config, world_size):
        try:
            plan = make_plan(candidate, world_size)
        except PlanError as error:
            problems = error.problems
            continue
        for variant in _variants(plan, config.machine):
            num_legal += 1
            memory = worst(make_memory(variant))
            if memory.total <= limit:
                fitting.append((step_bound_s(variant), variant, memory))
            elif closest is None or memory.total < closest[1].total:
                closest = variant, memory
    if not num_legal:
        raise PlanError(problems)
    fitting.sort(key=lambda one: one[0])
    return Found(
        layouts=_fastest(fitting, best),
        num_legal=num_legal,
        num_fitting=len(fitting),
        closest=closest,
    )


def layout_words(config: Config) -> list[str]:
    """Return `key=value` words of a layout; degrees of 1 and flags that are off are left out."""
    parallel = config.parallel
    words = [f"train.micro_batch_size={config.train.micro_batch_size}"]
    for node in dataclasses.fields(parallel):
        value = getattr(parallel, node.name)
        default = [] if node.name == "recompute_modules" else node.default
        if value != default:
            text = f"[{','.join(value)}]" if isinstance(value, list) else str(value)
            text = text.lower() if isinstance(value, bool) else text
            words.append(f"parallel.{node.name}={text}")
    return words


def _fastest(fitting: list[tuple[float, Plan, RankMemory]], best: int) -> list[Layout]:
    """Return the fastest of layouts that are in order of their bound."""
    found: list[Layout] = []
    for bound, plan, memory in fitting:
        if len(found) == best and bound >= found[-1].timing.step_s:
            break
        found.append(Layout(plan=plan, memory=memory, timing=make_timing(plan)))
        found.sort(key=lambda layout: layout.timing.step_s)
        del found[best:]
    return found


def _meshes(config: Config, world_size: int) -> Iterator[Config]:
    """Yield configs of every mesh and micro batch whose ranks add up, with no machine to fit on."""
    model = config.model
    is_moe = "moe" in channel_mixers(model) or model.mtp_num_layers > 0
    experts = _divisors(model.num_moe_experts or 1, world_size) if is_moe else [1]
    tensor = [n for n in _divisors(model.num_attention_heads, world_size) if n <= 8]
    rows_tokens = config.train.seq_length
    context = [n for n in (1, 2, 4, 8) if n <= world_size and (n == 1 or rows_tokens >= LONG_ROW)]
    depths = [n for n in _divisors(world_size, world_size) if n <= model.num_layers + 1]
    for tp, pp, ep, cp in itertools.product(tensor, depths, experts, context):
        for etp in sorted({1, tp}) if is_moe and tp > 1 and ep == 1 else [1]:
            for vpp in CHUNKS if pp > 1 else (None,):
                degrees = {
                    "tensor_model_parallel_size": tp,
                    "pipeline_model_parallel_size": pp,
                    "virtual_pipeline_model_parallel_size": vpp,
                    "expert_model_parallel_size": ep,
                    "expert_tensor_parallel_size": etp,
                    "context_parallel_size": cp,
                    "use_distributed_optimizer": False,
                }
                given: dict[str, Any] = {**degrees, **NO_RECOMPUTATION}
                parallel = dataclasses.replace(config.parallel, **given)
                if mesh_problems(parallel, world_size):
                    continue
                dp = make_mesh(parallel, world_size).dp
                for rows in MICRO_BATCHES:
                    if config.train.global_batch_size % (rows * dp) == 0:
                        yield dataclasses.replace(
                            config,
                            parallel=parallel,
                            train=dataclasses.replace(config.train, micro_batch_size=rows),
                            machine=MachineConfig(),
                        )


def _variants(plan: Plan, machine: MachineConfig) -> Iterator[Plan]:
    """Yield a legal plan with every way to save memory that changes no shape."""
    for sharded, recomputation in itertools.product((False, True), RECOMPUTATIONS):
        if sharded and plan.mesh.dp * plan.mesh.cp == 1:
            continue
        given: dict[str, Any] = {"use_distributed_optimizer": sharded, **recomputation}
        parallel = dataclasses.replace(plan.config.parallel, **given)
        config = dataclasses.replace(plan.config, parallel=parallel, machine=machine)
        if not coverage_problems(config, plan.mesh):
            yield dataclasses.replace(plan, config=config)


def _divisors(number: int, limit: int) -> list[int]:
    return [n for n in range(1, min(number, limit) + 1) if number % n == 0]
