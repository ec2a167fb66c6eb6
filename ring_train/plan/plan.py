"""make_plan: from what a person wrote to everything that follows from it."""

import dataclasses
from dataclasses import dataclass
from math import isfinite
from typing import Any

from ring_train.config import Config, DomainConfig, ModelConfig
from ring_train.plan.batch import BatchPlan
from ring_train.plan.cost import Cost, make_cost, state_bytes
from ring_train.plan.coverage import coverage_problems
from ring_train.plan.evaluation import evaluation_problems
from ring_train.plan.fields import passthrough_problems
from ring_train.plan.kernels import kernel_problems
from ring_train.plan.layers import LayerPlan, layer_problems, make_layers
from ring_train.plan.lora import LoraPlan, lora_problems, make_lora
from ring_train.plan.memory import make_memory, memory_problems
from ring_train.plan.mesh import DEGREES, Mesh, make_mesh, mesh_problems
from ring_train.plan.phases import Phase, StepPlan, make_phases, phase_problems, step_plan
from ring_train.plan.pipeline import PipelinePlan, make_pipeline, pipeline_problems
from ring_train.plan.problems import PlanError
from ring_train.plan.profiling import profiling_problems
from ring_train.plan.recompute import recompute_problems
from ring_train.plan.resilience import resilience_problems
from ring_train.plan.schedule import schedule_problems
from ring_train.plan.timing import machine_problems, timing_record


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will happen: the config and every number derived from it."""

    config: Config
    mesh: Mesh
    layers: LayerPlan
    pipeline: PipelinePlan
    phases: tuple[Phase, ...]
    cost: Cost
    """At the row length of the first phase."""
    lora: LoraPlan | None
    """None: all weights are trained."""

    @property
    def batch(self) -> BatchPlan:
        """Sizes of the first phase."""
        return self.phases[0].batch

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return sum(phase.num_tokens for phase in self.phases)

    def flops_per_token(self, phase: Phase) -> float:
        """Return the forward and backward FLOP of one token at a phase's row length."""
        return make_cost(self.config.model, self.layers, phase.batch.seq_length).flops_per_token

    @property
    def state_bytes(self) -> tuple[int, int]:
        """Bytes of (weights, gradients and optimizer) over all ranks, each part counted once."""
        weights = self.cost.num_parameters + self.cost.num_mtp_parameters
        adapters = 0 if self.lora is None else self.lora.num_parameters
        precision = self.config.train.precision
        return state_bytes(precision, weights + adapters, adapters or weights)

    def at(self, step: int) -> StepPlan:
        """Return what a step, counted from 0, reads."""
        return step_plan(self.phases, step)


def make_plan(config: Config, world_size: int) -> Plan:
    """Return the plan of a run; pure, and no process group is needed.

    Raises:
        PlanError: listing all problems. Values that are wrong by themselves come first and alone,
            because relations between them would make no sense.
    """
    problems = value_problems(config, world_size)
    if problems:
        raise PlanError(problems)
    mesh = make_mesh(config.parallel, world_size)
    problems = [
        *mesh_problems(config.parallel, world_size),
        *layer_problems(config.model, mesh),
        *pipeline_problems(config, mesh),
        *recompute_problems(config.parallel),
        *phase_problems(config, mesh),
        *schedule_problems(config),
        *passthrough_problems(config.model.megatron),
        *run_problems(config),
        *resilience_problems(config),
        *lora_problems(config),
        *evaluation_problems(config),
        *profiling_problems(config.logging, world_size),
        *machine_problems(config.machine),
        *kernel_problems(config, mesh),
    ]
    if problems:
        raise PlanError(problems)
    problems = coverage_problems(config, mesh)
    if problems:
        raise PlanError(problems)
    layers = make_layers(config.model)
    phases = make_phases(config, mesh)
    seq_length = phases[0].batch.seq_length
    plan = Plan(
        config=config,
        mesh=mesh,
        layers=layers,
        pipeline=make_pipeline(config.model, config.parallel, layers, mesh, seq_length),
        phases=phases,
        cost=make_cost(config.model, layers, seq_length),
        lora=make_lora(config, layers),
    )
    problems = memory_problems(plan)
    if problems:
        raise PlanError(problems)
    return plan


POSITIVE: dict[str, tuple[str, ...]] = {
    "model": (
        *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
        *("num_query_groups", "kv_channels", "vocab_size", "max_position_embeddings"),
        *("layer_group_size", "layernorm_epsilon", "init_method_std", "rotary_percent"),
        *("rotary_base", "rotary_scaling_factor", "original_max_position_embeddings"),
        *("group_norm_size", "num_moe_experts", "moe_router_topk"),
        *("moe_ffn_hidden_size", "moe_router_num_groups", "moe_router_group_topk"),
        *("moe_router_topk_scaling_factor", "moe_shared_expert_intermediate_size"),
    ),
    "parallel": (*DEGREES, "virtual_pipeline_model_parallel_size", "recompute_num_layers"),
    "train": (
        "num_steps",
        "seq_length",
        "micro_batch_size",
        "global_batch_size",
        "stop_after_step",
        "time_limit_s",
    ),
    "optim": ("lr", "adam_eps"),
    "checkpoint": ("keep",),
    "logging": ("interval_steps",),
    "resilience": ("spike_sigma", "hang_timeout_s"),
    "evaluation": (
        *("num_problems", "num_samples", "top_p", "max_new_tokens"),
        *("max_batch_size", "max_prefill_tokens"),
    ),
}
NOT_NEGATIVE: dict[str, tuple[str, ...]] = {
    "model": (
        *("first_k_dense_replace", "num_shared_experts", "moe_router_bias_update_rate"),
        *(
            "moe_z_loss_coeff",
            "moe_aux_loss_coeff",
            "mtp_num_layers",
            "mtp_loss_scaling_factor",
        ),
    ),
    "train": ("eval_interval_steps", "eval_steps"),
    "optim": (
        *("min_lr", "weight_decay", "adam_beta1", "adam_beta2", "clip_grad"),
        *("lr_warmup_steps", "lr_warmup_fraction", "wsd_decay_steps"),
    ),
    "checkpoint": ("interval_steps",),
    "resilience": (
        *("max_skipped_in_a_row", "max_roll_backs", "hang_grace_s", "io_patience_s"),
        "stop_margin_s",
    ),
    "evaluation": ("interval_steps", "temperature"),
}
BELOW_OR_AT_ONE: dict[str, tuple[str, ...]] = {
    "model": ("rotary_percent",),
    "optim": ("adam_beta1", "adam_beta2", "lr_warmup_fraction"),
    "evaluation": ("top_p",),
}


MAX_SEED = 2**63


def value_problems(config: Config, world_size: int) -> list[str]:
    """Return the numbers that are wrong whatever the others are."""
    problems = []
    if world_size < 1:
        problems.append(f"world_size={world_size} is not positive; start at least 1 rank")
    if not 0 <= config.seed < MAX_SEED:
        problems.append(f"seed={config.seed} is not from 0 to 2^63 - 1; choose e.g. 1234")
    for path, value in _numbers(config, POSITIVE):
        if not value > 0:
            problems.append(f"{path}={value} is not positive; choose a value above 0")
    for path, value in _numbers(config, NOT_NEGATIVE):
        if not value >= 0:
            problems.append(f"{path}={value} is negative; choose 0 or more")
    for path, value in _numbers(config, BELOW_OR_AT_ONE):
        if not value <= 1:
            problems.append(f"{path}={value} exceeds 1; choose a fraction")
    return problems


def _numbers(config: Config, table: dict[str, tuple[str, ...]]) -> list[tuple[str, Any]]:
    """Return (dotted path, value) of each number named in a table, nulls left out."""
    return [
        (f"{node}.{name}", value)
        for node, names in table.items()
        for name in names
        if (value := getattr(getattr(config, node), name)) is not None
    ]


def run_problems(config: Config) -> list[str]:
    """Return what is wrong with the mixture, validation and the start of a run."""
    domains, train = config.data.domains, config.train
    problems = [line for name, domain in domains.items() for line in _domain_problems(name, domain)]
    if domains and not any(domain.weight > 0 for domain in domains.values()):
        problems.append("data.domains.*.weight=0: nothing to sample; give one domain a weight")
    if train.eval_interval_steps and not train.eval_steps:
        problems.append(
            f"train.eval_steps=0 leaves nothing to evaluate every train.eval_interval_steps="
            f"{train.eval_interval_steps} steps; choose 1 or more, or set the interval to 0"
        )
    if config.decay_layer_rule is not None and config.init_from is None:
        problems.append(
            f"decay_layer_rule={config.decay_layer_rule} says how to read the folder of init_from, "
            "which is null; for a new model set model.decay_layer_rule"
        )
    return problems


def _domain_problems(name: str, domain: DomainConfig) -> list[str]:
    """Return which numbers of a domain are not what they can be."""
    path = f"data.domains.{name}"
    problems = []
    if not (domain.weight >= 0 and isfinite(domain.weight)):
        problems.append(f"{path}.weight={domain.weight} is not 0 or more; choose a finite share")
    for key in ("max_epochs", "max_tokens", "max_document_tokens"):
        value = getattr(domain, key)
        if value is not None and not (value > 0 and isfinite(value)):
            problems.append(f"{path}.{key}={value} is not positive; null means no limit")
    if domain.min_document_tokens < 0:
        problems.append(
            f"{path}.min_document_tokens={domain.min_document_tokens} is negative; choose 0 or more"
        )
    return problems


def model_at(plan: Plan, step: int) -> ModelConfig:
    """Return the model as it is after `step` steps, with what its phase changed."""
    phase = plan.at(max(step - 1, 0)).phase
    return dataclasses.replace(
        plan.config.model,
        rotary_base=phase.rotary_base,
        rotary_scaling_factor=phase.rotary_scaling_factor,
        moe_router_bias_update_rate=phase.moe_router_bias_update_rate,
    )


def plan_record(plan: Plan) -> dict[str, Any]:
    """Return the plan without its config as JSON types; counts lie at the top level."""
    return {
        **dataclasses.asdict(plan.cost),
        "mesh": dataclasses.asdict(plan.mesh),
        "layers": dataclasses.asdict(plan.layers),
        "pipeline": dataclasses.asdict(plan.pipeline),
        "batch": dataclasses.asdict(plan.batch),
        "phases": [dataclasses.asdict(phase) for phase in plan.phases],
        "lora": None if plan.lora is None else dataclasses.asdict(plan.lora),
        "total_tokens": plan.total_tokens,
        "run_dir": plan.config.run_dir,
        "world_size": plan.mesh.world_size,
        "num_steps": plan.config.train.num_steps,
        "memory": [
            {**dataclasses.asdict(rank), "total_bytes": rank.total} for rank in make_memory(plan)
        ],
        "timing": timing_record(plan),
    }
