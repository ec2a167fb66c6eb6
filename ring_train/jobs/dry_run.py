"""Print what a run would be: `python -m ring_train.jobs.dry_run model=PRESET [world_size=N]`.

The words are those of `pretrain`; with `job=sft` those of `sft`.

Starts no process group and imports neither torch nor megatron (a run that is given in epochs reads
its shards, and then torch is imported). Exits 0 for a legal plan and 2,
with every problem on standard error, for an illegal one.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from ring_train.config import DryRunConfig, KernelsConfig, ParallelConfig, RecomputeMethod
from ring_train.errors import UserError
from ring_train.jobs.machine_table import Row, machine_rows
from ring_train.jobs.run_config import run_config
from ring_train.jobs.run_length import with_num_steps
from ring_train.plan import Phase, Plan, make_plan, plan_record, smallest_world

USER_ERROR_STATUS = 2


def main(words: list[str]) -> int:
    """Print the plan of the given words; return the exit status."""
    try:
        config: DryRunConfig = run_config("dry_run", words)
        world_size = config.world_size
        if world_size is None:
            world_size = smallest_world(config.parallel)
        plan = make_plan(with_num_steps(config), world_size)
        if config.json is not None:
            write_plan(plan, config.json)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR_STATUS
    sys.stdout.write(table(rows(plan)))
    return 0


def write_plan(plan: Plan, path: str) -> None:
    """Write the plan as JSON; counts are keys of the top level."""
    text = json.dumps(plan_record(plan), indent=1) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"json={path} cannot be written: {error.strerror}") from error


def rows(plan: Plan) -> list[Row]:
    """Return the plan as (name, text) pairs; an empty name continues the row above."""
    model = [*_model_rows(plan), *_mesh_rows(plan), *_batch_rows(plan), *_cost_rows(plan)]
    return model + machine_rows(plan)


def table(pairs: list[Row]) -> str:
    """Return aligned lines."""
    width = max(len(name) for name, _ in pairs)
    return "".join(f"{name:<{width}}  {text}".rstrip() + "\n" for name, text in pairs)


def pattern(mixers: tuple[str, ...], group_size: int) -> str:
    """Return one letter per layer, a space after each layer group, and what the letters mean."""
    letters = "".join(mixer[0] for mixer in mixers)
    step = group_size if group_size > 1 else 10
    grouped = " ".join(letters[i : i + step] for i in range(0, len(letters), step))
    legend = ", ".join(
        f"{name[0]} = {name} x {mixers.count(name)}" for name in dict.fromkeys(mixers)
    )
    return f"{grouped}  ({legend})"


def _model_rows(plan: Plan) -> list[Row]:
    model, layers = plan.config.model, plan.layers
    heads = f"{model.num_attention_heads} heads of {model.kv_channels}"
    found = [
        ("family", model.architecture.value),
        ("width", f"hidden {model.hidden_size:,}, {heads}, vocabulary {model.vocab_size:,}"),
        ("layers", f"{model.num_layers}, and {layers.num_mtp} MTP"),
        ("token mixers", pattern(layers.token_mixers, model.layer_group_size)),
        ("channel mixers", pattern(layers.channel_mixers, model.layer_group_size)),
    ]
    if "lightning" in layers.token_mixers:
        found.append(("decay", model.decay_layer_rule.value))
    if "moe" in layers.channel_mixers:
        groups = model.moe_router_num_groups
        limited = f" in {model.moe_router_group_topk} of {groups} groups" if groups else ""
        routed = f"{model.num_moe_experts}, {model.moe_router_topk} per token{limited}"
        found.append(("experts", f"{routed}, {model.num_shared_experts} shared"))
    return found


def _mesh_rows(plan: Plan) -> list[Row]:
    mesh, parallel = plan.mesh, plan.config.parallel
    dense = f"tp {mesh.tp} x pp {mesh.pp} x cp {mesh.cp} x dp {mesh.dp}"
    experts = f"etp {mesh.etp} x pp {mesh.pp} x ep {mesh.ep} x dp {mesh.edp}"
    switches = {
        "sequence parallel": mesh.sequence_parallel,
        "distributed optimizer": parallel.use_distributed_optimizer,
        "overlapped gradient reduction": parallel.overlap_grad_reduce,
        "overlapped parameter gathering": parallel.overlap_param_gather,
    }
    chosen = ", ".join(name for name, on in switches.items() if on) or "none"
    return [
        ("ranks", f"{mesh.world_size} = {dense} (experts: {experts})"),
        ("sharding", chosen),
        ("recomputed", _recomputed(parallel)),
        ("kernels", _kernels(plan.config.kernels)),
        *_named("stages", (_stage(plan, i) for i in range(len(plan.pipeline.stages)))),
        *_busiest_rank(plan),
    ]


def _recomputed(parallel: ParallelConfig) -> str:
    """Return which activations the backward pass computes again."""
    if parallel.recompute_granularity is None:
        return "nothing"
    if parallel.recompute_modules:
        return ", ".join(parallel.recompute_modules)
    if parallel.recompute_method is RecomputeMethod.uniform:
        return f"all layers, in groups of {parallel.recompute_num_layers}, and MTP"
    return f"the first {parallel.recompute_num_layers} layers of each stage, and MTP"


def _kernels(kernels: KernelsConfig) -> str:
    """Return the choices of kernels that are not the default ones."""
    chosen = dataclasses.asdict(kernels).items()
    default = dataclasses.asdict(KernelsConfig())
    return ", ".join(f"{k} {v}" for k, v in chosen if v != default[k]) or "standard"


def _stage(plan: Plan, stage: int) -> str:
    """Return what one virtual pipeline stage holds."""
    pipeline, mesh = plan.pipeline, plan.mesh
    indices = pipeline.stages[stage]
    last = stage == len(pipeline.stages) - 1
    parts = [f"layers {indices[0]}-{indices[-1]}" if indices else "no layers"]
    if stage == 0:
        parts.insert(0, "embedding")
    if last:
        parts.append("output")
    if last and plan.layers.num_mtp:
        parts.append(f"{plan.layers.num_mtp} MTP")
    where = f"rank {stage % mesh.pp} chunk {stage // mesh.pp}" if mesh.vpp > 1 else f"{stage}"
    if len(pipeline.stages) == 1:
        return f"{where}: {', '.join(parts)}"
    mean = sum(pipeline.stage_flops) / len(pipeline.stage_flops)
    cost = f"{pipeline.stage_flops[stage] / mean:.2f} of the mean cost"
    return f"{where}: {', '.join(parts)}  ({len(indices)}, {cost})"


def _busiest_rank(plan: Plan) -> list[Row]:
    """Return what the busiest rank computes, where ranks hold several stages."""
    if plan.mesh.vpp == 1:
        return []
    flops = plan.pipeline.rank_flops(plan.mesh.pp)
    share = max(flops) * len(flops) / sum(flops)
    return [("", f"busiest: rank {flops.index(max(flops))}, {share:.2f} of the mean cost")]


def _batch_rows(plan: Plan) -> list[Row]:
    train = plan.config.train
    run = ("run", f"{train.num_steps:,} steps = {plan.total_tokens:,} tokens, {train.precision}")
    if not plan.config.phases:
        return [("step", _step(plan.phases[0])), run]
    return [run, *(row for phase in plan.phases for row in _phase_rows(phase))]


def _phase_rows(phase: Phase) -> list[Row]:
    """Return where a phase begins, what its steps are, and the share of each domain."""
    last = phase.first_step + phase.num_steps
    tokens = f"{phase.num_tokens:,} tokens"
    rows = [(f"phase {phase.name}", f"steps {phase.first_step + 1:,} to {last:,} = {tokens}")]
    rows.append(("", _step(phase)))
    if len(phase.ramp) > 1:
        sizes = ", ".join(f"{size:,} from step {step + 1:,}" for step, _, size in phase.ramp)
        rows.append(("", f"rows of a step: {sizes}"))
    scaling = f", stretched {phase.rotary_scaling_factor:g} times"
    stretched = scaling if phase.rotary_scaling_factor != 1 else ""
    rate = phase.moe_router_bias_update_rate
    rows.append(("", f"rope base {phase.rotary_base:g}{stretched}, expert-bias rate {rate:g}"))
    total = sum(phase.shares.values())
    for name, share in phase.shares.items():
        if share:
            about = "" if phase.num_samples % total == 0 else "about "
            part = f"{about}{phase.num_tokens * share // total:,} tokens"
            rows.append(("", f"{name}: {share / total:.2%}, {part}"))
    return rows


def _step(phase: Phase) -> str:
    batch = phase.batch
    row = f"{batch.global_batch_size:,} rows of {batch.seq_length:,} tokens"
    micro = f"{batch.num_micro_batches:,} micro batches of {batch.micro_batch_size} per rank"
    return f"{row} = {batch.tokens_per_step:,} tokens, {micro}"


def _cost_rows(plan: Plan) -> list[Row]:
    cost = plan.cost
    run_flops = sum(plan.flops_per_token(phase) * phase.num_tokens for phase in plan.phases)
    mtp = f"{_count(cost.num_mtp_parameters)}, {_count(cost.num_active_mtp_parameters)} active"
    per_token = f"{cost.flops_per_token / 1e9:,.3f} GFLOP per token, forward and backward"
    per_token += "" if plan.lora is None else " of all weights"
    return [
        ("parameters", f"{_count(cost.num_parameters)} without MTP"),
        ("active", f"{_count(cost.num_active_parameters)} per token"),
        ("", f"{_count(cost.num_active_non_embedding_parameters)} without embedding and output"),
        ("MTP", mtp if plan.layers.num_mtp else "none"),
        *_named("trained", _trained(plan)),
        ("state", _state(plan)),
        ("training", f"{per_token}; {run_flops:.3e} FLOP per run"),
    ]


def _trained(plan: Plan) -> list[str]:
    """Return which parameters are trained."""
    if plan.lora is None:
        return ["all weights"]
    lora = plan.config.lora
    everything = plan.cost.num_parameters + plan.cost.num_mtp_parameters
    share = plan.lora.num_parameters / everything
    return [
        f"{_count(plan.lora.num_parameters)}, {share:.2%} of all weights",
        f"adapters of rank {lora.rank} on {', '.join(lora.targets)}",
    ]


def _state(plan: Plan) -> str:
    """Return what weights, gradients and optimizer need over all ranks, each held once."""
    weights, training = plan.state_bytes
    total = f"{(weights + training) / 2**30:,.1f} GiB, each part once"
    parts = f"weights {weights / 2**30:,.1f}, gradients and optimizer {training / 2**30:,.1f}"
    return f"{total}: {parts}"


def _named(name: str, lines: Iterable[str]) -> list[Row]:
    """Return rows of which only the first is named."""
    return [(name if i == 0 else "", line) for i, line in enumerate(lines)]


def _count(number: int) -> str:
    """Return a count exactly and rounded."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number:,} ({number / size:.4g}{unit})"
    return f"{number:,}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
