"""Who owns each field of megatron-core's TransformerConfig: exactly one of four.

1. ours: a field of ModelConfig, ParallelConfig or KernelsConfig with the same name, copied;
2. derived: computed by `ring_train.plan.megatron`;
3. runtime: callables that `ring_train.train` attaches;
4. passed through: named in `model.megatron`; whatever nobody names keeps megatron's default.

The names come from a committed snapshot, so that checking a config does not import megatron.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from ring_train.config import KernelsConfig, ModelConfig, ParallelConfig
from ring_train.config.keys import nearest

SNAPSHOT_FILE = Path(__file__).parent / "megatron_fields.json"

DERIVED_FIELDS = frozenset(
    {
        # Ours under the same name, but megatron must see another value.
        "fp8",
        "moe_flex_dispatcher_backend",
        "moe_token_dispatcher_type",
        "transformer_impl",
        "moe_aux_loss_coeff",
        "moe_router_bias_update_rate",
        "moe_router_enable_expert_bias",
        "moe_z_loss_coeff",
        "mtp_loss_scaling_factor",
        "mtp_num_layers",
        "sequence_parallel",
        "virtual_pipeline_model_parallel_size",
        # Stages and their messages.
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
        "batch_p2p_comm",
        "microbatch_group_size_per_vp_stage",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "overlap_p2p_comm",
        "pipeline_model_parallel_layout",
        # Types and switches that follow from the plan.
        "bf16",
        "moe_layer_freq",
        "moe_router_score_function",
        "params_dtype",
        "pipeline_dtype",
        # The family and this trainer, not a choice.
        "activation_func",
        "add_bias_linear",
        "add_qkv_bias",
        "apply_rope_fusion",
        "attention_dropout",
        "attention_softmax_in_fp32",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "calculate_per_token_loss",
        "cuda_graph_modules",
        "fp8_recipe",
        "gated_linear_unit",
        "gradient_accumulation_fusion",
        "hidden_dropout",
        "masked_softmax_fusion",
        "moe_grouped_gemm",
        "moe_router_dtype",
        "moe_router_load_balancing_type",
        "normalization",
        "perform_initialization",
        "persist_layer_norm",
        "use_cpu_initialization",
        "variable_seq_lengths",
    }
)

RUNTIME_FIELDS = frozenset(
    {
        "finalize_model_grads_func",
        "grad_scale_func",
        "grad_sync_func",
        "moe_grad_scale_func",
        "mtp_grad_scale_func",
        "no_sync_func",
        "param_sync_func",
        "timers",
    }
)


@functools.cache
def snapshot() -> dict[str, Any]:
    """Return {"megatron_core": version, "fields": {name: default}} as committed."""
    return json.loads(SNAPSHOT_FILE.read_text(encoding="ascii"))


@functools.cache
def owners() -> dict[str, str]:
    """Return the owner of each TransformerConfig field that has one besides `model.megatron`."""
    found = {}
    for group, node in (
        ("model", ModelConfig),
        ("parallel", ParallelConfig),
        ("kernels", KernelsConfig),
    ):
        for field in dataclasses.fields(node):
            if field.name in snapshot()["fields"]:
                found[field.name] = f"{group}.{field.name}"
    for name in DERIVED_FIELDS:
        found.setdefault(name, "the plan, which derives it")
    for name in RUNTIME_FIELDS:
        found.setdefault(name, "the training loop")
    return found


def same_named_fields(node: ModelConfig | ParallelConfig | KernelsConfig) -> dict[str, Any]:
    """Return the values of a config node that TransformerConfig gets unchanged, by name."""
    names = snapshot()["fields"].keys() - DERIVED_FIELDS
    found = dataclasses.fields(node)
    return {field.name: getattr(node, field.name) for field in found if field.name in names}


def passthrough_problems(megatron: dict[str, Any]) -> list[str]:
    """Return what is wrong with the names in `model.megatron`."""
    problems = []
    names = snapshot()["fields"].keys()
    for name, value in megatron.items():
        owner = owners().get(name)
        if owner is not None:
            problems.append(
                f"model.megatron.{name}={value}: the field belongs to {owner}; remove it here"
            )
        elif name not in names:
            problems.append(
                f"model.megatron.{name}={value} is not a field of TransformerConfig in "
                f"megatron-core {snapshot()['megatron_core']}"
                f"{nearest(name, names) or '; remove it'}"
            )
    return problems
