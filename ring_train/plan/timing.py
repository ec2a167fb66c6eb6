"""Time of one step on the machine of the config, part by part; an estimate, see docs/planner.md.

Compute of a stage is its FLOP at the rates of the machine file, plus what is bound by memory. The
pipeline is simulated pass by pass, so stages of unequal time cost what they cost. Communication
inside a layer is not overlapped; that of gradients and parameters is where the config says so.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

from ring_train.config import MachineConfig, ModelConfig, ParallelConfig, RecomputeGranularity
from ring_train.plan.cost import layer_flops
from ring_train.plan.footprint import FP32, Rows
from ring_train.plan.kernels import keeps_all_logits
from ring_train.plan.memory import rank_rows, rank_weights, stage_mixers
from ring_train.plan.mesh import Mesh
from ring_train.plan.mixers import LIGHTNING_CHUNK
from ring_train.plan.simulation import pipeline_seconds

if TYPE_CHECKING:
    from ring_train.plan.phases import Phase
    from ring_train.plan.plan import Plan

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6
BACKWARD = 2
"""A backward pass costs two forwards."""
LIGHTNING_FORWARD_TENSORS = 4
"""Query, key, value and output pass through memory; 7 more tensors in the backward pass."""
ELEMENTWISE_TENSORS = 24
"""Hidden-state tensors that norms, residuals and rotations of a layer read and write, forward."""
OPTIMIZER_TENSORS = 7
"""fp32 numbers that AdamW reads and writes of each parameter."""
GPU_DAY_S = 86400
WAYS = ("forward", "backward")
OVERLAPPED = 0.2
"""Of an overlapped collective this share is still seen."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one step at the busiest pipeline rank, and what follows from them."""

    parts: dict[str, float]
    """Add up to step_s."""
    tokens_per_s: float
    tokens_per_day: float
    utilisation: float
    """Model FLOP per second over the peak of all devices."""
    run_days: float
    """At the pace of each phase."""
    cost: float | None
    """Of the run, in the currency of the machine file; None = no price is given."""

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.parts.values())


def make_timing(plan: Plan) -> Timing:
    """Return the timing of the first phase, and days and cost of all; needs a machine."""
    machine, world = plan.config.machine, plan.mesh.world_size
    first, parts = plan.phases[0], step_parts(plan, plan.phases[0])
    seconds = sum(sum(step_parts(plan, p).values()) * _full_steps(p) for p in plan.phases)
    tokens_per_s = first.batch.tokens_per_step / sum(parts.values())
    price = machine.price_per_gpu_hour
    return Timing(
        parts=parts,
        tokens_per_s=tokens_per_s,
        tokens_per_day=tokens_per_s * GPU_DAY_S,
        utilisation=plan.flops_per_token(first)
        * tokens_per_s
        / (world * machine.peak_tflops * TERA),
        run_days=seconds / GPU_DAY_S,
        cost=None if price is None else seconds / 3600 * world * price,
    )


def timing_record(plan: Plan) -> dict[str, Any] | None:
    """Return the timing as JSON types; None without a machine."""
    if plan.config.machine.name is None:
        return None
    timing = make_timing(plan)
    return {**dataclasses.asdict(timing), "step_s": timing.step_s}


def machine_problems(machine: MachineConfig) -> list[str]:
    """Return which figures of a machine are not what they can be."""
    if machine.name is None:
        return []
    positive = ("memory_gib", "peak_tflops", "gemm_tflops", "memory_gb_per_s", "gpus_per_node")
    positive += ("intra_node_gb_per_s", "inter_node_gb_per_s")
    fractions = ("expert_gemm_fraction", "attention_fraction", "lightning_roofline_fraction")
    not_negative = ("intra_node_latency_us", "inter_node_latency_us", "workspace_gib")
    not_negative += ("slack_fraction",)
    values = dataclasses.asdict(machine)
    problems = [
        f"machine.{name}={values[name]} is not positive and finite; give what the device has"
        for name in positive
        if not (values[name] > 0 and isfinite(values[name]))
    ]
    problems += [
        f"machine.{name}={values[name]} is not above 0 and at most 1; give a fraction"
        for name in fractions
        if not 0 < values[name] <= 1
    ]
    problems += [
        f"machine.{name}={values[name]} is not 0 or more and finite; give what the device has"
        for name in not_negative
        if not (values[name] >= 0 and isfinite(values[name]))
    ]
    if not (machine.expert_imbalance >= 1 and isfinite(machine.expert_imbalance)):
        problems.append(
            f"machine.expert_imbalance={machine.expert_imbalance} is not 1 or more; the busiest "
            "rank has at least the mean"
        )
    price = machine.price_per_gpu_hour
    if price is not None and not (price >= 0 and isfinite(price)):
        problems.append(f"machine.price_per_gpu_hour={price} is not 0 or more; null prints no cost")
    return problems


def _full_steps(phase: Phase) -> float:
    """Return the steps of a phase as steps of the full batch."""
    return phase.num_samples / phase.batch.global_batch_size


def step_parts(plan: Plan, phase: Phase) -> dict[str, float]:
    """Return the seconds of one step of a phase by cause."""
    stages, busy = _busy_seconds(plan, phase)
    forward, backward = ([sum(stage[way].values()) for stage in stages] for way in WAYS)
    m, pp = phase.batch.num_micro_batches, plan.mesh.pp
    total = pipeline_seconds(forward, backward, pp, m)
    rank = busy.index(max(busy))
    parts: dict[str, float] = {}
    for stage in stages[rank::pp]:
        for way in WAYS:
            for name, seconds in stage[way].items():
                parts[name] = parts.get(name, 0.0) + m * seconds
    parts["pipeline bubble"] = max(0.0, total - m * busy[rank])
    return parts | _worst_update(plan)


def step_bound_s(plan: Plan) -> float:
    """Return the seconds of a step of the first phase without pipeline bubbles: never too many."""
    phase = plan.phases[0]
    _, busy = _busy_seconds(plan, phase)
    return phase.batch.num_micro_batches * max(busy) + sum(_worst_update(plan).values())


def _busy_seconds(
    plan: Plan, phase: Phase
) -> tuple[list[dict[str, dict[str, float]]], list[float]]:
    """Return the parts of each virtual stage, and the seconds that each rank computes a batch."""
    pp = plan.mesh.pp
    rows = rank_rows(plan.config, plan.mesh, phase.batch)
    stages = [_stage_seconds(plan, i, rows, phase) for i in range(pp * plan.mesh.vpp)]
    each = [sum(sum(stage[way].values()) for way in WAYS) for stage in stages]
    return stages, [sum(each[rank::pp]) for rank in range(pp)]


def _worst_update(plan: Plan) -> dict[str, float]:
    """Return the parts after the last backward of the pipeline rank where they take longest."""
    ranks = (_update_parts(plan, rank) for rank in range(plan.mesh.pp))
    return max(ranks, key=lambda parts: sum(parts.values()))


def _stage_seconds(plan: Plan, stage: int, rows: Rows, phase: Phase) -> dict[str, dict[str, float]]:
    """Return {"forward"/"backward": {part: seconds}} of one micro batch in a virtual stage."""
    config, mesh = plan.config, plan.mesh
    model, machine = config.model, config.machine
    forward: dict[str, float] = {}
    again: dict[str, float] = {}
    share = _recomputed_share(config.parallel, len(plan.pipeline.stages[stage]))
    for pair, count in Counter(stage_mixers(plan, stage)).items():
        for name, seconds in _layer_seconds(model, machine, mesh, rows, pair, phase).items():
            forward[name] = forward.get(name, 0.0) + count * seconds
    for name, seconds in forward.items():
        again[name] = seconds * share.get(name, share.get("all", 0.0))
    if stage == len(plan.pipeline.stages) - 1:
        heads, h = 1 + plan.layers.num_mtp, model.hidden_size
        matrices = heads * model.vocab_size + plan.layers.num_mtp * 2 * h
        flops = 2.0 * rows.tokens * h * matrices / mesh.tp
        forward["output head"] = flops / (machine.gemm_tflops * TERA)
        logits = heads * rows.tokens * model.vocab_size / mesh.tp
        traffic = 3 * logits * FP32
        if not keeps_all_logits(config, rows.tokens):
            # Written and read by one kernel; the backward pass forms them again.
            traffic = 2 * logits * rows.element_bytes
            again["output head"] = 2.0 * h * logits / (machine.gemm_tflops * TERA)
        forward["output head"] += traffic / (machine.memory_gb_per_s * GIGA)
    if mesh.pp > 1:
        size = rows.sharded_tokens * rows.element_bytes * model.hidden_size
        forward["pipeline transfers"] = _transfer(machine, size, mesh.tp * mesh.dp * mesh.cp, 2)
    twice = {name: BACKWARD * seconds for name, seconds in forward.items()}
    for name in ("pipeline transfers", "tensor collectives", "expert all-to-all", "context"):
        if name in twice:
            twice[name] = forward[name]
    backward = {name: seconds + again.get(name, 0.0) for name, seconds in twice.items()}
    return {"forward": forward, "backward": backward}


def _recomputed_share(parallel: ParallelConfig, num_layers: int) -> dict[str, float]:
    """Return the share of the forward that the backward repeats, by part."""
    if parallel.recompute_granularity is RecomputeGranularity.full:
        uniform = parallel.recompute_method is not None and parallel.recompute_method == "uniform"
        count = num_layers if uniform else min(parallel.recompute_num_layers or 0, num_layers)
        return {"all": count / num_layers if num_layers else 1.0}
    share: dict[str, float] = {}
    if "core_attn" in parallel.recompute_modules:
        share |= {"softmax attention": 1.0, "lightning attention": 1.0}
    if "moe" in parallel.recompute_modules:
        share |= {"expert products": 1.0, "expert all-to-all": 1.0, "shared and dense MLP": 1.0}
    if {"mlp", "shared_experts"} & set(parallel.recompute_modules):
        share["shared and dense MLP"] = 1.0
    return share


def _layer_seconds(
    model: ModelConfig,
    machine: MachineConfig,
    mesh: Mesh,
    rows: Rows,
    pair: tuple[str, str],
    phase: Phase,
) -> dict[str, float]:
    """Return the forward seconds of one micro batch in one layer, by cause."""
    token, channel = pair
    t, h, a = rows.tokens, model.hidden_size, rows.element_bytes
    gemm, copy = machine.gemm_tflops * TERA, machine.memory_gb_per_s * GIGA
    heads = model.num_attention_heads * model.kv_channels
    core = 2.0 * phase.batch.seq_length * heads if token == "gqa" else 0.0
    total = layer_flops(model, token, channel, phase.batch.seq_length)
    if token == "lightning":
        core = model.num_attention_heads * (
            2 * LIGHTNING_CHUNK * model.kv_channels + 4 * model.kv_channels**2
        )
    inner = model.moe_router_topk * model.moe_ffn_hidden_size
    routed = 6.0 * h * inner if channel == "moe" else 0.0
    shared = model.moe_shared_expert_intermediate_size or 0
    mlp = 6.0 * h * (model.ffn_hidden_size if channel == "dense" else 0)
    mlp += 6.0 * h * shared if channel == "moe" else 0.0
    parts = {"attention projections": t * (total - core - routed - mlp) / mesh.tp / gemm}
    parts["shared and dense MLP"] = t * mlp / mesh.tp / gemm
    if token == "gqa":
        parts["softmax attention"] = t * core / mesh.tp / (gemm * machine.attention_fraction)
    elif token == "lightning":
        traffic = LIGHTNING_FORWARD_TENSORS * t * heads / mesh.tp * a
        parts["lightning attention"] = traffic / (copy * machine.lightning_roofline_fraction)
    parts["norms and copies"] = ELEMENTWISE_TENSORS * rows.sharded_tokens * h * a / copy
    if channel == "moe":
        uneven = rows.expert_imbalance if mesh.ep > 1 else 1.0
        rate = gemm * machine.expert_gemm_fraction
        # Each rank's tokens spread evenly over ep; etp ranks share the work of an expert.
        parts["expert products"] = rows.sharded_tokens * routed * uneven / rate
        dispatched = rows.sharded_tokens * model.moe_router_topk * h * a
        parts["norms and copies"] += 6 * dispatched / copy
        if mesh.ep * mesh.etp > 1:
            ranks = mesh.ep * mesh.etp
            sent = dispatched * uneven * (ranks - 1) / ranks
            parts["expert all-to-all"] = 2 * _transfer(machine, sent, 1, ranks)
    if mesh.tp > 1:
        size = t * h * a * (mesh.tp - 1) / mesh.tp
        # Gather before and scatter after each of the two mixers.
        parts["tensor collectives"] = 4 * _transfer(machine, size, 1, mesh.tp)
    if mesh.cp > 1:
        keys = 2 * model.num_query_groups * model.kv_channels // mesh.tp * t * a * (mesh.cp - 1)
        state = heads // mesh.tp * model.kv_channels * FP32 * (mesh.cp - 1)
        size = keys if token == "gqa" else state
        parts["context"] = _transfer(machine, size, mesh.tp, mesh.cp)
    return parts


def _transfer(machine: MachineConfig, size: float, stride: int, ranks: int) -> float:
    """Return the seconds that `ranks` devices, `stride` apart, need for so many bytes of each."""
    span = stride * ranks
    if span <= machine.gpus_per_node:
        rate, latency = machine.intra_node_gb_per_s, machine.intra_node_latency_us
    else:
        rate, latency = machine.inter_node_gb_per_s, machine.inter_node_latency_us
        if stride == 1:  # what stays in the node takes the fast link
            size *= 1 - machine.gpus_per_node / span
    return latency * MICRO + size / (rate * GIGA)


def _update_parts(plan: Plan, rank: int) -> dict[str, float]:
    """Return the seconds after the last backward: gradients, update, parameters."""
    config, mesh, machine = plan.config, plan.mesh, plan.config.machine
    parallel = config.parallel
    element = rank_rows(config, mesh, plan.batch).element_bytes
    _, trained = rank_weights(plan, rank)
    reduce = gather = 0.0
    shards = 0.0
    for count, size, stride in (
        (trained.dense, mesh.dp * mesh.cp, mesh.tp),
        (trained.experts, mesh.edp, mesh.ep * mesh.etp),
    ):
        sharded = parallel.use_distributed_optimizer
        shards += count / (size if sharded else 1)
        if size > 1 and count:
            part = (size - 1) / size
            passes = 1 if sharded else 2
            reduce += _transfer(machine, passes * part * count * FP32, stride, size)
            gather += _transfer(machine, part * count * element, stride, size) if sharded else 0.0
    reduce *= OVERLAPPED if parallel.overlap_grad_reduce else 1.0
    gather *= OVERLAPPED if parallel.overlap_param_gather else 1.0
    update = OPTIMIZER_TENSORS * FP32 * shards / (machine.memory_gb_per_s * GIGA)
    return {"gradient reduction": reduce, "parameter gathering": gather, "optimizer": update}
