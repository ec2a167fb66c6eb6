"""Peak memory of every pipeline rank, part by part, from the shards that it really holds.

Ranks of one pipeline stage hold the same, except that routing loads their experts differently: the
busiest one is predicted. What is not known is named as what it is: workspace and slack are figures
of the machine file.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING

from ring_train.config import (
    Config,
    ModelConfig,
    ParallelConfig,
    Precision,
    RecomputeGranularity,
)
from ring_train.config.choices import RecomputeMethod, TransformerImpl
from ring_train.plan.cost import WEIGHT_BYTES
from ring_train.plan.footprint import FP32, INT64, STATE_PROGRAMS, Kept, RankWeights, Rows
from ring_train.plan.kernels import groups_experts, keeps_all_logits, uses_triton
from ring_train.plan.lora import PROJECTIONS
from ring_train.plan.mesh import Mesh
from ring_train.plan.mixers import CHANNEL_MIXERS, MTP_MIXERS, TOKEN_MIXERS

if TYPE_CHECKING:
    from ring_train.plan.batch import BatchPlan
    from ring_train.plan.plan import Plan

GIB = 2**30
MOMENTS_BYTES = 8
ROW_FED = ("linear_proj", "linear_fc2")
"""Projections whose inputs are cut over tensor-parallel ranks; of the others the outputs are."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Peak bytes of the device of one pipeline rank."""

    pipeline_rank: int
    parts: dict[str, int]
    """Weights, gradients, optimizer, activations, head, live, buffers, workspace, slack."""
    host_bytes: int
    """Besides, in host memory: the copy that an asynchronous save writes from."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def largest(self) -> list[str]:
        """The three largest parts with their size."""
        parts = sorted(self.parts.items(), key=lambda part: -part[1])[:3]
        return [f"{name} {size / GIB:,.1f}" for name, size in parts]


def make_memory(plan: Plan) -> tuple[RankMemory, ...]:
    """Return the peak of each pipeline rank, in the phase where it is highest."""
    found = [
        tuple(_rank_memory(plan, rank, phase.batch) for rank in range(plan.mesh.pp))
        for phase in plan.phases
    ]
    return max(found, key=lambda ranks: max(rank.total for rank in ranks))


def worst(ranks: tuple[RankMemory, ...]) -> RankMemory:
    """Return the pipeline rank that needs most."""
    return max(ranks, key=lambda rank: rank.total)


def memory_problems(plan: Plan) -> list[str]:
    """Return why a plan does not fit the machine it is held against."""
    machine = plan.config.machine
    if machine.name is None:
        return []
    rank = worst(make_memory(plan))
    if rank.total <= machine.memory_gib * GIB:
        return []
    return [
        f"machine={machine.name} has {machine.memory_gib:,.1f} GiB a device, but pipeline rank "
        f"{rank.pipeline_rank} of {plan.mesh.pp} is predicted to need {rank.total / GIB:,.1f} GiB "
        f"(largest: {', '.join(rank.largest)}); {'; '.join(_ways_out(plan))}; or machine=none to "
        "plan without a limit"
    ]


def _ways_out(plan: Plan) -> list[str]:
    """Return what would make a plan smaller and is not done yet."""
    parallel, batch = plan.config.parallel, plan.batch
    ways = []
    if not parallel.use_distributed_optimizer and plan.mesh.dp * plan.mesh.cp > 1:
        ways.append("set parallel.use_distributed_optimizer=true")
    if parallel.recompute_granularity is not RecomputeGranularity.full:
        ways.append(
            "recompute (parallel.recompute_granularity=full parallel.recompute_method=uniform "
            "parallel.recompute_num_layers=1)"
        )
    if batch.micro_batch_size > 1:
        ways.append(f"lower train.micro_batch_size={batch.micro_batch_size}")
    return [*ways, "raise the tensor, pipeline or expert parallel sizes (plan_search finds them)"]


def in_flight(pp: int, vpp: int, rank: int, num_micro_batches: int) -> list[int]:
    """Return how many micro batches each chunk of a pipeline rank keeps at the peak.

    1F1B keeps pp - rank; interleaved, a rank starts 2 (pp - rank - 1) + (vpp - 1) pp forwards
    before its first backward, in groups of pp micro batches a chunk.

    Source: megatron-core 0.19.2 `pipeline_parallel/schedules.py`, get_pp_rank_microbatches.
    """
    if vpp == 1:
        return [min(pp - rank, num_micro_batches)]
    total = num_micro_batches * vpp
    passes = 2 * (pp - rank - 1) + (vpp - 1) * pp + 1
    passes = total if num_micro_batches == pp else min(passes, total)
    count = Counter(k // pp % vpp for k in range(passes))
    return [min(count[chunk], num_micro_batches) for chunk in range(vpp)]


def rank_rows(config: Config, mesh: Mesh, batch: BatchPlan) -> Rows:
    """Return one micro batch as a rank sees it."""
    tokens = -(-batch.tokens_per_micro_batch // mesh.cp)
    kernels, precision = config.kernels, config.train.precision
    has_kernels = uses_triton(kernels.lightning, precision)
    is_wide = precision is Precision.fp32
    are_grouped = kernels.transformer_impl is TransformerImpl.local and groups_experts(config)
    are_apart = mesh.ep * mesh.etp > 1 or kernels.moe_shared_expert_overlap
    return Rows(
        tokens=tokens,
        sharded_tokens=-(-tokens // mesh.tp) if mesh.sequence_parallel else tokens,
        element_bytes=WEIGHT_BYTES[config.train.precision],
        expert_imbalance=config.machine.expert_imbalance,
        is_fused=uses_triton(kernels.fused, precision),
        are_experts_grouped=are_grouped,
        is_dispatched=are_apart or not are_grouped,
        # As `chunk_size_for` of ring_train.ops.kernels has it on a Hopper, and torch.
        state_chunk=(32 if is_wide else 128) if has_kernels else 64,
        state_element_bytes=2 if has_kernels and not is_wide else FP32,
        state_programs=STATE_PROGRAMS if has_kernels else 0,
    )


def rank_weights(plan: Plan, rank: int) -> tuple[RankWeights, RankWeights]:
    """Return (all parameters, trained ones) of one pipeline rank."""
    config, mesh = plan.config, plan.mesh
    model, h = config.model, config.model.hidden_size
    held = trained = RankWeights()
    for chunk in range(mesh.vpp):
        stage = chunk * mesh.pp + rank
        for pair, count in Counter(stage_mixers(plan, stage)).items():
            held += _layer_weights(model, mesh, pair) * count
            if plan.lora is not None:
                trained += _adapters(config, mesh, pair) * count
        first, last = stage == 0, stage == mesh.pp * mesh.vpp - 1
        vocabulary = model.vocab_size // mesh.tp * h
        if first or (last and plan.layers.num_mtp and mesh.pp > 1):
            held += RankWeights(dense=vocabulary)
        if last:
            depth = 2 * h * h // mesh.tp + 3 * h
            held += RankWeights(dense=vocabulary + h + plan.layers.num_mtp * depth)
    if plan.lora is None:
        return held, held
    return held + trained, trained


def stage_mixers(plan: Plan, stage: int) -> list[tuple[str, str]]:
    """Return (token mixer, channel mixer) of the layers of a virtual stage, MTP layers last."""
    layers = plan.layers
    pairs = [
        (layers.token_mixers[i], layers.channel_mixers[i]) for i in plan.pipeline.stages[stage]
    ]
    last = stage == len(plan.pipeline.stages) - 1
    return pairs + [MTP_MIXERS] * (layers.num_mtp if last else 0)


def _layer_weights(model: ModelConfig, mesh: Mesh, pair: tuple[str, str]) -> RankWeights:
    """Return the parameters of one layer with its two norms."""
    token, channel = TOKEN_MIXERS[pair[0]], CHANNEL_MIXERS[pair[1]]
    both = token.weights(model, mesh) + channel.weights(model, mesh)
    return both + RankWeights(dense=2 * model.hidden_size)


def _adapters(config: Config, mesh: Mesh, pair: tuple[str, str]) -> RankWeights:
    """Return the low-rank adapters of one layer; each is cut like its weight."""
    dense = experts = 0
    rank = config.lora.rank or 0
    projections = {
        name: projection
        for mixer in pair
        if mixer in PROJECTIONS
        for name, projection in PROJECTIONS[mixer](config.model).items()
    }
    for name, one in projections.items():
        if rank and name in config.lora.targets:
            routed = name.startswith("experts.")
            cut = mesh.etp if routed else mesh.tp
            row_fed = name.endswith(ROW_FED)
            inputs = one.inputs // (cut if row_fed else 1)
            outputs = one.outputs // (1 if row_fed else cut)
            count = rank * (inputs + outputs) * (one.count // mesh.ep if routed else one.count)
            dense, experts = (dense, experts + count) if routed else (dense + count, experts)
    return RankWeights(dense=dense, experts=experts)


def _rank_memory(plan: Plan, rank: int, batch: BatchPlan) -> RankMemory:
    """Return the peak of one pipeline rank at the sizes of one phase."""
    config, mesh, machine = plan.config, plan.mesh, plan.config.machine
    rows = rank_rows(config, mesh, batch)
    held, trained = rank_weights(plan, rank)
    element = rows.element_bytes
    optimizer = _optimizer_bytes(config, mesh, trained)
    activations = head = 0
    live: list[int] = []
    transient: list[int] = []
    counts = in_flight(mesh.pp, mesh.vpp, rank, batch.num_micro_batches)
    for chunk, count in enumerate(counts):
        stage = chunk * mesh.pp + rank
        kept, again, passing = _chunk_bytes(plan, stage, rows)
        activations += count * kept
        live.append(again)
        transient.append(passing)
        if stage == mesh.pp * mesh.vpp - 1:
            saved, passing = _head_bytes(plan, rows)
            head += count * saved
            transient.append(passing)
    # Received and sent hidden states, and their gradients.
    sends = 4 * rows.sharded_tokens * element * config.model.hidden_size if mesh.pp > 1 else 0
    at_work = max(live) + max(transient)
    parts = {
        "weights": (held.dense + held.experts) * element + held.buffers * FP32,
        "gradients": (trained.dense + trained.experts) * FP32,
        "optimizer": optimizer,
        "activations": activations,
        "output head": head,
        "one layer at work": at_work,
        "buffers": sends + _largest_gradient(config, mesh, element),
        "workspace": round(machine.workspace_gib * GIB),
        "slack": round(machine.slack_fraction * (activations + head + at_work)),
    }
    saved_state = parts["weights"] + optimizer
    host = saved_state if config.checkpoint.async_save else 0
    return RankMemory(pipeline_rank=rank, parts=parts, host_bytes=host)


def _optimizer_bytes(config: Config, mesh: Mesh, trained: RankWeights) -> int:
    """Return fp32 copies, where weights are not fp32, and two moments, sharded if they are."""
    each = MOMENTS_BYTES + (FP32 if WEIGHT_BYTES[config.train.precision] < FP32 else 0)
    if not config.parallel.use_distributed_optimizer:
        return each * (trained.dense + trained.experts)
    dense = -(-trained.dense // (mesh.dp * mesh.cp))
    return each * (dense + -(-trained.experts // mesh.edp))


def _largest_gradient(config: Config, mesh: Mesh, element: int) -> int:
    """Return the gradient of the embedding before it is added to the fp32 buffer."""
    if config.lora.rank is not None:
        return 0
    return config.model.vocab_size // mesh.tp * config.model.hidden_size * element


def _chunk_bytes(plan: Plan, stage: int, rows: Rows) -> tuple[int, int, int]:
    """Return bytes of a virtual stage: (kept of a micro batch, computed again, passing)."""
    config, mesh = plan.config, plan.mesh
    parallel, h = config.parallel, config.model.hidden_size
    pairs = stage_mixers(plan, stage)
    kinds = {pair: layer_kept(config.model, mesh, rows, pair) for pair in set(pairs)}
    layers = [kinds[pair] for pair in pairs]
    passing = max((layer.transient for layer in layers), default=0)
    # Cosines and sines of the tokens' angles, in fp32.
    angles = round(2 * FP32 * rows.tokens * config.model.kv_channels * config.model.rotary_percent)
    boundary = rows.sharded_tokens * rows.element_bytes * h
    if parallel.recompute_granularity is RecomputeGranularity.full:
        num_mtp = plan.layers.num_mtp if stage == len(plan.pipeline.stages) - 1 else 0
        kept, again = _full_recompute(
            parallel, [layer.total for layer in layers], num_mtp, boundary
        )
        return kept + angles, again, passing
    modules = parallel.recompute_modules
    kept = sum(layer.without(modules) for layer in layers)
    again = max((layer.total - layer.without(modules) for layer in layers), default=0)
    # A recomputed channel mixer keeps its input.
    kept += boundary * len(layers) if {"mlp", "moe"} & set(modules) else 0
    return kept + angles, again, passing


def _full_recompute(
    parallel: ParallelConfig, layers: list[int], num_mtp: int, boundary: int
) -> tuple[int, int]:
    """Return (bytes kept, bytes computed again at a time) of one stage; MTP layers come last."""
    split = len(layers) - num_mtp
    own, mtp = layers[:split], layers[split:]
    size = parallel.recompute_num_layers or 1
    if parallel.recompute_method is RecomputeMethod.block:
        groups, plain = [[layer] for layer in own[:size]], own[size:]
    else:
        groups, plain = [own[i : i + size] for i in range(0, split, size)], []
    groups += [[layer] for layer in mtp]
    kept = sum(plain) + boundary * (len(groups) + len(mtp))
    return kept, max((sum(group) for group in groups), default=0)


def layer_kept(model: ModelConfig, mesh: Mesh, rows: Rows, pair: tuple[str, str]) -> Kept:
    """Return what one layer keeps, its two norms included."""
    token = TOKEN_MIXERS[pair[0]].activation_bytes(model, mesh, rows)
    channel = CHANNEL_MIXERS[pair[1]].activation_bytes(model, mesh, rows)
    norms = 2 * norm_bytes(model, rows)
    return Kept(
        rest=token.rest + channel.rest + norms,
        modules=token.modules | channel.modules,
        transient=max(token.transient, channel.transient),
    )


def norm_bytes(model: ModelConfig, rows: Rows) -> int:
    """Return what an RMSNorm keeps: input in fp32, what it normalised, one fp32 number a token.

    Fused, its input alone.
    """
    if rows.is_fused:
        return rows.sharded_tokens * rows.element_bytes * model.hidden_size
    return rows.sharded_tokens * ((rows.element_bytes + FP32) * model.hidden_size + FP32)


def _head_bytes(plan: Plan, rows: Rows) -> tuple[int, int]:
    """Return bytes of what follows the layers: (kept, passing while one head is at work).

    With all logits each head keeps softmax(logits) in fp32; its backward makes the gradient of
    that, and that of the logits in the dtype of the weights. In chunks it keeps the hidden states
    of all tensor-parallel ranks and one number a token; in passing there are the logits of a chunk,
    and the gradient of the hidden states, summed in fp32 for the tokens of a tile.
    """
    config, mesh, depths = plan.config, plan.mesh, plan.layers.num_mtp
    a, h, t = rows.element_bytes, config.model.hidden_size, rows.tokens
    vocabulary = config.model.vocab_size // mesh.tp
    hidden = rows.sharded_tokens * a * h
    if keeps_all_logits(config, t):
        kept = t * (FP32 * vocabulary + 17) + hidden
        passing = t * vocabulary * (FP32 + a)
    else:
        logits = config.kernels.cross_entropy_chunk_tokens * vocabulary
        kept = t * (INT64 + FP32 + a * h)
        passing = logits * a + t * h * a + hidden
        if plan.lora is None:
            passing += min(t, isqrt(logits)) * h * FP32
        if not rows.is_fused:
            # torch computes exponentials beside the logits, and widens them before.
            passing += logits * (FP32 + (FP32 if a < FP32 else 0))
    each = kept + norm_bytes(config.model, rows)
    # eh_proj's input and the norms of embedding and hidden states; what the last norm has made is
    # an input in fp32 already, else it is copied.
    joined = 2 * hidden + 2 * norm_bytes(config.model, rows) - (hidden if a == FP32 else 0)
    return (1 + depths) * each + depths * joined, passing
