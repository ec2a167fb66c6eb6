"""The registry of mixers: what a layer may be made of, what it costs, and who builds it.

A layer is one token mixer and one channel mixer. A new mixer is one more entry in TOKEN_MIXERS or
CHANNEL_MIXERS: its formulas, its checks, and the dotted path of the function that makes its
megatron spec, `function(plan, transformer_config)`, which the model layer imports when it builds.
Norms between mixers belong to the layer, see `ring_train.plan.cost`.

FLOPs are those of one token's forward: 2 per multiplied weight, plus the attention itself.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ring_train.config import ModelConfig, ScoreFunction
from ring_train.plan import footprint
from ring_train.plan.footprint import Kept, RankWeights, Rows
from ring_train.plan.mesh import Mesh, tensor_split_problems
from ring_train.plan.problems import indivisible

LIGHTNING_CHUNK = 64
"""Tokens per chunk that the FLOP formula of lightning attention assumes."""

MTP_MIXERS = ("gqa", "moe")
"""Token and channel mixer of every MTP layer, in hybrid models too (model-spec 2.4)."""


def _no_problems(model: ModelConfig, mesh: Mesh) -> list[str]:
    return []


def _input_kept(model: ModelConfig, mesh: Mesh, rows: Rows) -> Kept:
    """Return what a mixer keeps of which nobody said more: input and output."""
    return Kept(rest=2 * rows.sharded_tokens * rows.element_bytes * model.hidden_size)


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """One kind of token or channel mixer."""

    num_parameters: Callable[[ModelConfig], int]
    """All parameters of one layer's mixer; buffers of a checkpoint count."""
    num_active_parameters: Callable[[ModelConfig], int]
    """Parameters that one token meets."""
    flops_per_token: Callable[[ModelConfig, int], float]
    """Forward FLOPs of one token in a row of the given length, causal."""
    spec: str
    """"module:function", resolved by `ring_train.model.specs`."""
    problems: Callable[[ModelConfig, Mesh], list[str]] = _no_problems
    """What this mixer cannot do under a model and mesh, one line each."""
    rank_weights: Callable[[ModelConfig, Mesh], RankWeights] | None = None
    """What one rank holds; None: all parameters, on every rank."""
    activation_bytes: Callable[[ModelConfig, Mesh, Rows], Kept] = _input_kept
    """What one rank keeps for the backward of one micro batch."""

    def weights(self, model: ModelConfig, mesh: Mesh) -> RankWeights:
        """Return the parameters of one rank."""
        if self.rank_weights is None:
            return RankWeights(dense=self.num_parameters(model))
        return self.rank_weights(model, mesh)


def _qk_norms(model: ModelConfig) -> int:
    return 2 * model.kv_channels if model.qk_layernorm else 0


def _gqa_matrices(model: ModelConfig) -> int:
    heads = 2 * model.num_attention_heads + 2 * model.num_query_groups
    return model.hidden_size * heads * model.kv_channels


def _gqa_parameters(model: ModelConfig) -> int:
    return _gqa_matrices(model) + _qk_norms(model)


def _gqa_rank_weights(model: ModelConfig, mesh: Mesh) -> RankWeights:
    return footprint.attention_weights(model, mesh, model.num_query_groups, gated=False)


def _gqa_flops(model: ModelConfig, seq_length: int) -> float:
    # Scores and weighted values: 2 * 2 * d per head and visible token, s/2 visible on average.
    attention = 2 * seq_length * model.num_attention_heads * model.kv_channels
    return 2 * _gqa_matrices(model) + attention


def _gqa_problems(model: ModelConfig, mesh: Mesh) -> list[str]:
    key = "model.num_attention_heads"
    groups = model.num_query_groups
    problems = indivisible(key, model.num_attention_heads, "model.num_query_groups", groups)
    return problems + tensor_split_problems({"model.num_query_groups": groups}, mesh.tp)


def _lightning_matrices(model: ModelConfig) -> int:
    # Query, key, value, gate and output projection: full heads everywhere.
    return 5 * model.hidden_size * model.num_attention_heads * model.kv_channels


def _lightning_parameters(model: ModelConfig) -> int:
    gate_norm = model.num_attention_heads * model.kv_channels
    return _lightning_matrices(model) + gate_norm + _qk_norms(model)


def _lightning_rank_weights(model: ModelConfig, mesh: Mesh) -> RankWeights:
    return footprint.attention_weights(model, mesh, model.num_attention_heads, gated=True)


def _lightning_flops(model: ModelConfig, seq_length: int) -> float:
    # Within a chunk 4 C d / 2, state read and update 4 d^2, per head.
    d = model.kv_channels
    attention = model.num_attention_heads * (2 * LIGHTNING_CHUNK * d + 4 * d * d)
    return 2 * _lightning_matrices(model) + attention


def _lightning_problems(model: ModelConfig, mesh: Mesh) -> list[str]:
    groups = model.group_norm_size
    problems = indivisible(
        "model.num_attention_heads",
        model.num_attention_heads,
        "model.group_norm_size",
        groups,
    )
    return problems + tensor_split_problems({"model.group_norm_size": groups}, mesh.tp)


def _dense_parameters(model: ModelConfig) -> int:
    return 3 * model.hidden_size * model.ffn_hidden_size


def _dense_flops(model: ModelConfig, seq_length: int) -> float:
    return 2 * _dense_parameters(model)


def _dense_problems(model: ModelConfig, mesh: Mesh) -> list[str]:
    return tensor_split_problems({"model.ffn_hidden_size": model.ffn_hidden_size}, mesh.tp)


def _moe_matrices(model: ModelConfig, experts: int) -> int:
    """Return weights of `experts` routed experts, the shared ones and the router."""
    routed = experts * model.moe_ffn_hidden_size
    shared = model.moe_shared_expert_intermediate_size or 0
    router = model.hidden_size * (model.num_moe_experts or 0)
    return 3 * model.hidden_size * (routed + shared) + router


def _expert_bias(model: ModelConfig) -> int:
    return (model.num_moe_experts or 0) if model.moe_router_enable_expert_bias else 0


def _moe_parameters(model: ModelConfig) -> int:
    return _moe_matrices(model, model.num_moe_experts or 0) + _expert_bias(model)


def _moe_active_parameters(model: ModelConfig) -> int:
    return _moe_matrices(model, model.moe_router_topk) + _expert_bias(model)


def _moe_flops(model: ModelConfig, seq_length: int) -> float:
    return 2 * _moe_matrices(model, model.moe_router_topk)


def _moe_problems(model: ModelConfig, mesh: Mesh) -> list[str]:
    experts = model.num_moe_experts
    if experts is None:
        return ["model.num_moe_experts=None, but some layers are MoE; give the number of experts"]
    ep = "parallel.expert_model_parallel_size"
    problems = indivisible("model.num_moe_experts", experts, ep, mesh.ep)
    if mesh.tp > 1 and not mesh.sequence_parallel:
        problems.append(
            f"parallel.sequence_parallel=False with parallel.tensor_model_parallel_size={mesh.tp}: "
            "MoE layers under tensor parallelism need it; leave sequence_parallel at null"
        )
    shared = model.moe_shared_expert_intermediate_size
    if bool(shared) != bool(model.num_shared_experts):
        problems.append(
            f"model.num_shared_experts={model.num_shared_experts} contradicts "
            f"model.moe_shared_expert_intermediate_size={shared}; give both, or 0 and null"
        )
    elif shared:
        key = "model.moe_shared_expert_intermediate_size"
        count = model.num_shared_experts
        problems += indivisible(key, shared, "model.num_shared_experts", count)
        problems += tensor_split_problems({key: shared}, mesh.tp)
    return problems + _router_problems(model, experts)


def _router_problems(model: ModelConfig, experts: int) -> list[str]:
    """Return what is wrong with expert selection."""
    problems = []
    topk, score = model.moe_router_topk, model.moe_router_score_function
    if topk > experts:
        problems.append(
            f"model.moe_router_topk={topk} exceeds model.num_moe_experts={experts}; choose fewer"
        )
    if model.moe_router_enable_expert_bias and score is not ScoreFunction.sigmoid:
        problems.append(
            f"model.moe_router_score_function={score} has no expert bias; "
            "set model.moe_router_enable_expert_bias=false or use sigmoid"
        )
    groups, kept = model.moe_router_num_groups, model.moe_router_group_topk
    if (groups is None) != (kept is None):
        problems.append(
            f"model.moe_router_num_groups={groups} contradicts "
            f"model.moe_router_group_topk={kept}; give both or neither"
        )
    if groups is None or kept is None:
        return problems
    return problems + _router_group_problems(model, experts, groups, kept)


def _router_group_problems(model: ModelConfig, experts: int, groups: int, kept: int) -> list[str]:
    """Return what is wrong with expert groups.

    A group's score is the sum of its two best experts in Hugging Face code, and of its
    topk / group_topk best in megatron-core: they agree only where that ratio is 2.
    """
    topk = model.moe_router_topk
    if experts % groups:
        return indivisible("model.num_moe_experts", experts, "model.moe_router_num_groups", groups)
    if kept > groups:
        return [
            (
                f"model.moe_router_group_topk={kept} exceeds model.moe_router_num_groups={groups}; "
                f"keep at most {groups} groups"
            )
        ]
    problems = []
    available = kept * (experts // groups)
    if topk > available:
        problems.append(
            f"model.moe_router_topk={topk} exceeds the {available} experts of "
            f"model.moe_router_group_topk={kept} groups; keep more groups or choose fewer experts"
        )
    if topk != 2 * kept:
        problems.append(
            f"model.moe_router_topk={topk} is not 2 * model.moe_router_group_topk={kept}; group "
            "scores sum the two best experts, so keep topk / 2 groups"
        )
    return problems


TOKEN_MIXERS: dict[str, Mixer] = {
    "gqa": Mixer(
        num_parameters=_gqa_parameters,
        num_active_parameters=_gqa_parameters,
        flops_per_token=_gqa_flops,
        spec="ring_train.model.specs:gqa_spec",
        problems=_gqa_problems,
        rank_weights=_gqa_rank_weights,
        activation_bytes=footprint.gqa_kept,
    ),
    "lightning": Mixer(
        num_parameters=_lightning_parameters,
        num_active_parameters=_lightning_parameters,
        flops_per_token=_lightning_flops,
        spec="ring_train.model.specs:lightning_spec",
        problems=_lightning_problems,
        rank_weights=_lightning_rank_weights,
        activation_bytes=footprint.lightning_kept,
    ),
}

CHANNEL_MIXERS: dict[str, Mixer] = {
    "dense": Mixer(
        num_parameters=_dense_parameters,
        num_active_parameters=_dense_parameters,
        flops_per_token=_dense_flops,
        spec="ring_train.model.specs:dense_spec",
        problems=_dense_problems,
        rank_weights=footprint.dense_weights,
        activation_bytes=footprint.dense_kept,
    ),
    "moe": Mixer(
        num_parameters=_moe_parameters,
        num_active_parameters=_moe_active_parameters,
        flops_per_token=_moe_flops,
        spec="ring_train.model.specs:moe_spec",
        problems=_moe_problems,
        rank_weights=footprint.moe_weights,
        activation_bytes=footprint.moe_kept,
    ),
}
