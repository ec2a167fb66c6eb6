"""megatron-core's config objects, built from the plan; no other file here needs torch."""

import warnings
from typing import Any

import ring_train.platform  # noqa: F401  (before the first import of megatron-core)

# isort: split
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_train.config import Fp8, Precision
from ring_train.plan.fields import same_named_fields
from ring_train.plan.plan import Plan

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16}


def make_transformer_config(plan: Plan) -> TransformerConfig:
    """Return megatron's model config: ours by name, derived here, then passed through."""
    model, parallel = plan.config.model, plan.config.parallel
    nodes = (model, parallel, plan.config.kernels)
    fields = {k: v for node in nodes for k, v in same_named_fields(node).items()}
    fields |= derived_fields(plan)
    if model.num_moe_experts is None:
        fields = {name: value for name, value in fields.items() if not name.startswith("moe_")}
    with warnings.catch_warnings():
        # Recomputing core_attn is in vain for Transformer Engine's attention, which is not used.
        warnings.filterwarnings("ignore", message=".*core_attn recompute is really needed")
        return TransformerConfig(**fields, **model.megatron)


def derived_fields(plan: Plan) -> dict[str, Any]:
    """Return the TransformerConfig fields that no config node gives, see `plan.fields`."""
    dtype = DTYPES[plan.config.train.precision]
    return {
        **ours_to_compute(),
        **pipeline_fields(plan),
        "sequence_parallel": plan.mesh.sequence_parallel,
        "bf16": dtype is torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "moe_layer_freq": [int(mixer == "moe") for mixer in plan.layers.channel_mixers],
        "moe_router_score_function": plan.config.model.moe_router_score_function.value,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": False,
        "normalization": "RMSNorm",
        "activation_func": torch.nn.functional.silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "calculate_per_token_loss": True,
        "variable_seq_lengths": False,
        # Weights are drawn by global parameter name, after construction.
        "perform_initialization": False,
        "use_cpu_initialization": True,
        **kernel_fields(plan),
        **LOCAL_KERNELS,
    }


def kernel_fields(plan: Plan) -> dict[str, Any]:
    """Return the fields that choose megatron's kernels and dispatcher."""
    kernels = plan.config.kernels
    has_fp8 = kernels.fp8 is not Fp8.none
    return {
        "transformer_impl": kernels.transformer_impl.value,
        "fp8": "e4m3" if has_fp8 else None,
        "fp8_recipe": kernels.fp8.value if has_fp8 else "delayed",
        "moe_token_dispatcher_type": kernels.moe_token_dispatcher_type.value,
        "moe_flex_dispatcher_backend": kernels.moe_flex_dispatcher_backend.value,
    }


def pipeline_fields(plan: Plan) -> dict[str, Any]:
    """Return the fields that place layers on stages and order their messages.

    Interleaved chunks send in both directions at once. Between two ranks megatron's batched
    messages would be confused: the first sent forward is received as the first sent backward.
    """
    pp, vpp = plan.mesh.pp, plan.mesh.vpp
    layout: list[list[str]] = [["decoder"] * len(stage) for stage in plan.pipeline.stages]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return {
        "pipeline_model_parallel_layout": PipelineParallelLayerLayout([*layout], pp),
        "virtual_pipeline_model_parallel_size": vpp if vpp > 1 else None,
        "microbatch_group_size_per_vp_stage": pp,
        "overlap_p2p_comm": vpp > 1,
        "batch_p2p_comm": vpp == 1,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
    }


def ours_to_compute() -> dict[str, Any]:
    """Return neutral values for what megatron could compute, but this trainer computes itself.

    Expert bias and its update, the losses of the router, and MTP: megatron-core 0.19.2 has no
    zero-mean bias update, and normalises the MTP loss per micro batch.
    """
    return {
        "moe_router_enable_expert_bias": False,
        "moe_router_bias_update_rate": 0.0,
        "moe_z_loss_coeff": None,
        "moe_aux_loss_coeff": 0.0,
        "mtp_num_layers": None,
        "mtp_loss_scaling_factor": None,
    }


LOCAL_KERNELS: dict[str, Any] = {
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    # The default warns that it is deprecated.
    "cuda_graph_modules": [],
}
"""Fusions of megatron's that this project does itself or does not use."""


def make_ddp_config(plan: Plan) -> DistributedDataParallelConfig:
    """Return megatron's data-parallel config; the loss is normalised by us, so sums are plain."""
    parallel = plan.config.parallel
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        average_in_collective=False,
        check_for_nan_in_grad=False,
    )


def make_optimizer_config(plan: Plan) -> OptimizerConfig:
    """Return megatron's optimizer config: AdamW with fp32 master weights and moments."""
    optim = plan.config.optim
    dtype = DTYPES[plan.config.train.precision]
    return OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.min_lr,
        weight_decay=optim.weight_decay,
        decoupled_weight_decay=True,
        adam_beta1=optim.adam_beta1,
        adam_beta2=optim.adam_beta2,
        adam_eps=optim.adam_eps,
        clip_grad=optim.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=plan.config.parallel.use_distributed_optimizer,
        overlap_param_gather=plan.config.parallel.overlap_param_gather,
    )
