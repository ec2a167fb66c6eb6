"""Which choices of kernels contradict the run or each other."""

from ring_train.config import (
    Config,
    CrossEntropyKernel,
    ExpertKernel,
    Fp8,
    Kernel,
    LightningKernel,
    Precision,
    TokenDispatcher,
    TransformerImpl,
)
from ring_train.plan.fields import snapshot
from ring_train.plan.mesh import Mesh

FP8_BLOCK = 128
"""Channels or tokens of a block of the FP8 recipe."""
UNUSUAL_EXPERTS = (
    *("fp4", "glu_linear_offset", "activation_func_clamp_value"),
    *("moe_apply_probs_on_input", "moe_latent_size", "moe_expert_capacity_factor"),
    *("moe_pad_expert_input_to_capacity", "moe_router_padding_for_quantization"),
)
"""Fields in model.megatron by which experts, or what they are sent, differ from ours."""


def kernel_problems(config: Config, mesh: Mesh) -> list[str]:
    """Return what is wrong with the kernels of a run."""
    kernels = config.kernels
    problems = [*_engine_problems(config), *_fp8_problems(config, mesh)]
    if kernels.cross_entropy_chunk_tokens < 1:
        problems.append(
            f"kernels.cross_entropy_chunk_tokens={kernels.cross_entropy_chunk_tokens} is not "
            "positive; choose e.g. 1024, or kernels.cross_entropy=full"
        )
    if kernels.experts is ExpertKernel.grouped:
        problems += _grouped_problems(config)
    flex = kernels.moe_token_dispatcher_type is TokenDispatcher.flex
    if flex and mesh.ep * mesh.etp == 1:
        problems.append(
            "kernels.moe_token_dispatcher_type=flex moves tokens between ranks, but experts are "
            "on one rank (parallel.expert_model_parallel_size=1); choose alltoall"
        )
    if flex and config.train.precision is not Precision.bf16:
        problems.append(
            f"kernels.moe_token_dispatcher_type=flex moves bf16, but train.precision="
            f"{config.train.precision.value}; choose train.precision=bf16 or alltoall"
        )
    if kernels.moe_shared_expert_overlap and flex:
        problems.append(
            "kernels.moe_shared_expert_overlap=true is of the dispatcher alltoall, but "
            "kernels.moe_token_dispatcher_type=flex; choose one of both"
        )
    if kernels.moe_shared_expert_overlap and not config.model.moe_shared_expert_intermediate_size:
        problems.append(
            "kernels.moe_shared_expert_overlap=true, but the model has no shared expert "
            "(model.moe_shared_expert_intermediate_size=null); set it to false"
        )
    return problems


def _grouped_problems(config: Config) -> list[str]:
    problems = []
    if any(name.startswith("experts.") for name in config.lora.targets):
        problems.append(
            "kernels.experts=grouped has no adapters, but lora.targets names routed experts; "
            "choose kernels.experts=sequential or auto"
        )
    return problems + [
        f"kernels.experts=grouped does not compute model.megatron.{name}="
        f"{config.model.megatron[name]}; remove it, or choose kernels.experts=sequential or auto"
        for name in _unusual_fields(config)
    ]


def _unusual_fields(config: Config) -> list[str]:
    given, defaults = config.model.megatron, snapshot()["fields"]
    return [name for name in UNUSUAL_EXPERTS if given.get(name, defaults[name]) != defaults[name]]


def groups_experts(config: Config) -> bool:
    """Return whether the routed experts of a rank are multiplied in one product."""
    chosen = config.kernels.experts
    if chosen is not ExpertKernel.auto:
        return chosen is ExpertKernel.grouped
    targets = [] if config.lora.rank is None else config.lora.targets
    has_adapters = any(name.startswith("experts.") for name in targets)
    return not has_adapters and not _unusual_fields(config)


def _engine_problems(config: Config) -> list[str]:
    kernels = config.kernels
    if kernels.transformer_impl is TransformerImpl.local:
        return []
    problems = []
    if config.lora.rank is not None:
        problems.append(
            "kernels.transformer_impl=transformer_engine has no adapters, but lora.rank="
            f"{config.lora.rank}; choose kernels.transformer_impl=local"
        )
    if config.train.precision is not Precision.bf16:
        problems.append(
            "kernels.transformer_impl=transformer_engine computes in bf16, but train.precision="
            f"{config.train.precision.value}; choose train.precision=bf16, or "
            "kernels.transformer_impl=local"
        )
    if kernels.experts is not ExpertKernel.auto:
        problems.append(
            f"kernels.experts={kernels.experts.value} is of kernels.transformer_impl=local; "
            "leave it at auto"
        )
    return problems


def _fp8_problems(config: Config, mesh: Mesh) -> list[str]:
    kernels, model = config.kernels, config.model
    if kernels.fp8 is Fp8.none:
        return []
    problems = []
    if kernels.transformer_impl is TransformerImpl.local:
        problems.append(
            f"kernels.fp8={kernels.fp8.value} needs kernels.transformer_impl=transformer_engine"
        )
    heads = model.num_attention_heads * model.kv_channels
    row = config.train.micro_batch_size * config.train.seq_length
    shares = mesh.cp * (mesh.tp if mesh.sequence_parallel else 1)
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.num_attention_heads * model.kv_channels over tp": heads / mesh.tp,
        "model.ffn_hidden_size over tp": model.ffn_hidden_size / mesh.tp,
        "a rank's part of train.micro_batch_size * train.seq_length tokens": row / shares,
    }
    if model.num_moe_experts:
        sizes["model.moe_ffn_hidden_size over etp"] = model.moe_ffn_hidden_size / mesh.etp
    if model.moe_shared_expert_intermediate_size:
        shared = model.moe_shared_expert_intermediate_size / mesh.tp
        sizes["model.moe_shared_expert_intermediate_size over tp"] = shared
    for name, size in sizes.items():
        if size % FP8_BLOCK:
            problems.append(
                f"kernels.fp8={kernels.fp8.value} works on blocks of {FP8_BLOCK} channels or "
                f"tokens, but {name} is {size:g}; choose sizes and degrees that leave whole blocks"
            )
    return problems


def uses_triton(choice: Kernel | LightningKernel, precision: Precision) -> bool:
    """Return whether a kernel is Triton's where the run has its GPUs; `auto` is, but in fp32.

    What `auto` takes on a CPU in bf16 keeps more, which no plan is made for.
    """
    return choice.value == "triton" or (choice.value == "auto" and precision is Precision.bf16)


def keeps_all_logits(config: Config, row_tokens: int) -> bool:
    """Return whether a row of so many tokens (of one rank) has all its logits at once."""
    kernels = config.kernels
    full = kernels.cross_entropy is CrossEntropyKernel.full
    return full or row_tokens <= kernels.cross_entropy_chunk_tokens
