"""What one rank holds of a mixer: weights, and the bytes that a forward keeps for its backward.

The formulas were read off saved tensors of the modules that `ring_train.model` builds; a test holds
them against the tensors that autograd really keeps. Bytes are those of one micro batch.
"""

from dataclasses import dataclass, field

from ring_train.config import ModelConfig
from ring_train.plan.mesh import Mesh

FP32 = 4
INT64 = 8
STATE_PROGRAMS = 264
STATE_COLUMNS = 64
"""PROGRAMS and MAX_COLUMNS of ring_train.ops.kernels.lightning_states; a test holds them equal."""


@dataclass(frozen=True, kw_only=True)
class RankWeights:
    """Parameters of one rank; routed experts apart, their data-parallel group is another."""

    dense: int = 0
    experts: int = 0
    buffers: int = 0
    """fp32 numbers that no optimizer knows."""

    def __add__(self, other: "RankWeights") -> "RankWeights":
        """Return the sum of both."""
        return RankWeights(
            dense=self.dense + other.dense,
            experts=self.experts + other.experts,
            buffers=self.buffers + other.buffers,
        )

    def __mul__(self, count: int) -> "RankWeights":
        """Return so many times the same."""
        return RankWeights(
            dense=self.dense * count, experts=self.experts * count, buffers=self.buffers * count
        )


@dataclass(frozen=True, kw_only=True)
class Rows:
    """One micro batch as a rank sees it."""

    tokens: int
    """Of the context-parallel part; [t/cp]."""
    sharded_tokens: int
    """Between tensor-parallel regions; [t/cp/sp]."""
    element_bytes: int
    """Of an activation."""
    expert_imbalance: float
    """Tokens of the busiest rank's experts over the mean."""
    is_fused: bool
    """Norms, rotation and gates keep their inputs alone, see `ring_train.plan.kernels`."""
    are_experts_grouped: bool
    """Routed experts are multiplied in one product, see `ring_train.plan.kernels`."""
    is_dispatched: bool
    """megatron's dispatcher moves the tokens of experts."""
    state_chunk: int
    """Tokens of a chunk of lightning attention, of which each keeps one state of every head."""
    state_element_bytes: int
    """Of such a state."""
    state_programs: int
    """That the pass over states is cut for; each segment keeps one more state. 0: no segments."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes kept for the backward pass of one mixer."""

    rest: int
    """What no module of selective recomputation covers."""
    modules: dict[str, int] = field(default_factory=dict)
    """By the name in parallel.recompute_modules."""
    transient: int = 0
    """Besides, while the mixer runs."""

    @property
    def total(self) -> int:
        """Bytes without recomputation."""
        return self.rest + sum(self.modules.values())

    def without(self, modules: list[str]) -> int:
        """Return the bytes that stay when the named modules are computed again."""
        gone = {*modules, "shared_experts"} if "moe" in modules else set(modules)
        return self.rest + sum(size for name, size in self.modules.items() if name not in gone)


def attention_weights(model: ModelConfig, mesh: Mesh, groups: int, gated: bool) -> RankWeights:
    """Return projections and norms of softmax (not gated) or lightning attention (gated)."""
    heads = (2 + gated) * model.num_attention_heads + 2 * groups
    matrices = model.hidden_size * heads * model.kv_channels
    gate_norm = model.num_attention_heads * model.kv_channels if gated else 0
    qk_norms = 2 * model.kv_channels if model.qk_layernorm else 0
    return RankWeights(dense=(matrices + gate_norm) // mesh.tp + qk_norms)


def dense_weights(model: ModelConfig, mesh: Mesh) -> RankWeights:
    """Return the dense MLP."""
    return RankWeights(dense=3 * model.hidden_size * model.ffn_hidden_size // mesh.tp)


def moe_weights(model: ModelConfig, mesh: Mesh) -> RankWeights:
    """Return routed and shared experts and the router, which every rank holds whole."""
    h, experts = model.hidden_size, model.num_moe_experts or 0
    shared = 3 * h * (model.moe_shared_expert_intermediate_size or 0) // mesh.tp
    return RankWeights(
        dense=shared + h * experts,
        experts=experts // mesh.ep * 3 * h * model.moe_ffn_hidden_size // mesh.etp,
        buffers=experts if model.moe_router_enable_expert_bias else 0,
    )


def _upcast(rows: Rows, width: int) -> int:
    """Return the fp32 copy that a norm makes of an input of another dtype, bytes of a token."""
    return FP32 * width if rows.element_bytes < FP32 else 0


def _angles(model: ModelConfig, rows: Rows) -> int:
    """Return cosines and sines in another dtype than fp32, once for query and key."""
    if rows.element_bytes == FP32:
        return 0
    return round(4 * rows.element_bytes * model.kv_channels * model.rotary_percent)


def gqa_kept(model: ModelConfig, mesh: Mesh, rows: Rows) -> Kept:
    """Return what softmax attention keeps: projections, both norms, rotated heads, output."""
    heads = model.num_attention_heads // mesh.tp
    groups = max(1, model.num_query_groups // mesh.tp)
    query, key = heads * model.kv_channels, groups * model.kv_channels
    a, t = rows.element_bytes, rows.tokens
    wide = query + 2 * key  # qkv, of which the value is a view
    wide += query + key + query  # rotated query and key; input of the output projection
    norms = 0
    if rows.is_fused:
        wide += key  # the value is apart as well
    elif model.qk_layernorm:
        wide += query + key
        norms = FP32 * (query + heads + groups) + _upcast(rows, key)
    # Keys and values of all context ranks, instead of this one's rotated key.
    gathered = (2 * mesh.cp - 1) * key * a * t if mesh.cp > 1 else 0
    return Kept(
        rest=t * (a * wide + norms + (0 if rows.is_fused else _angles(model, rows)))
        + rows.sharded_tokens * a * model.hidden_size,
        modules={"core_attn": t * (a * query + FP32 * heads) + gathered},
        transient=t * a * 3 * query + gathered,
    )


def lightning_kept(model: ModelConfig, mesh: Mesh, rows: Rows) -> Kept:
    """Return what lightning attention keeps: as softmax, gate, its norm, and chunk states."""
    heads, d = model.num_attention_heads // mesh.tp, model.kv_channels
    width = heads * d
    a, t = rows.element_bytes, rows.tokens
    if rows.is_fused:
        # qkv; query, key and value; output, gate and their product.
        per_token = a * (3 + 3 + 3) * width
    else:
        count = 3 + 2 + 1  # qkv; rotated query and key; output projection
        count += 3 if model.linear_silu else 0
        # The gate, its product and the norm between them are computed in fp32.
        norms = FP32 * (4 * width + max(1, model.group_norm_size // mesh.tp))
        if model.qk_layernorm:
            count += 2
            norms += 2 * FP32 * heads + _upcast(rows, 2 * width)
        per_token = a * count * width + norms + _angles(model, rows)
    chunks = -(-t // rows.state_chunk)
    segments = _segments(chunks, heads * -(-d // STATE_COLUMNS), rows.state_programs)
    states = heads * (chunks + segments) * d * d * rows.state_element_bytes
    if mesh.cp > 1:
        # The states in which this rank's two segments begin; torch keeps what reads them, too.
        states += 2 * heads * d * d * FP32 + (0 if rows.state_programs else t * width * FP32)
    return Kept(
        rest=t * per_token + rows.sharded_tokens * a * model.hidden_size,
        modules={"core_attn": states},
        transient=t * a * 4 * width + 2 * states,
    )


def _segments(chunks: int, programs: int, wanted: int) -> int:
    """Return the segments of a row, see `make_states` of ring_train.ops.kernels; 0 for one."""
    if not wanted:
        return 0
    each = -(-chunks // min(chunks, -(-wanted // programs)))
    count = -(-chunks // each)
    return count if count > 1 else 0


def _mlp_kept(tokens: float, rows: Rows, hidden: int, inner: int) -> int:
    """Return an MLP's input and its gate, up, activations and product: five inner widths."""
    a = rows.element_bytes
    return round(rows.sharded_tokens * a * hidden + tokens * a * 5 * inner)


def dense_kept(model: ModelConfig, mesh: Mesh, rows: Rows) -> Kept:
    """Return what the dense MLP keeps."""
    inner = model.ffn_hidden_size // mesh.tp
    kept = _mlp_kept(rows.tokens, rows, model.hidden_size, inner)
    a = rows.element_bytes
    return Kept(rest=0, modules={"mlp": kept}, transient=rows.tokens * a * 2 * inner)


def moe_kept(model: ModelConfig, mesh: Mesh, rows: Rows) -> Kept:
    """Return what the router, routed experts and shared experts keep, at the busiest rank."""
    a, k, h = rows.element_bytes, model.moe_router_topk, model.hidden_size
    experts, t = model.num_moe_experts or 0, rows.sharded_tokens
    # Router logits in fp32 and which are chosen; not fused, also scores, their sums and the ids.
    scores = 2 * FP32 * experts + k * (FP32 + INT64) + 2 * FP32
    if rows.is_fused:  # but the balance loss takes scores of its own
        scores = (FP32 + 1 + (FP32 if model.moe_aux_loss_coeff else 0)) * experts
    # The order of all (token, expert) pairs; or the row of each chosen one, and which is in a row.
    routing = t * (scores + INT64 * (k + (experts if rows.is_dispatched else k)))
    # Tokens of the ranks that share an expert are gathered before it.
    copies = t * k * mesh.etp * (rows.expert_imbalance if mesh.ep > 1 else 1.0)
    inner = model.moe_ffn_hidden_size // mesh.etp
    # Gate and up, and what is computed from them one after the other, or at once.
    widths = (3 if rows.is_fused else 5) if rows.are_experts_grouped else 6
    routed = round(copies * (a * (h + widths * inner) + FP32))
    modules = {"moe": routing + routed}
    shared = model.moe_shared_expert_intermediate_size
    if shared:
        modules["shared_experts"] = _mlp_kept(rows.tokens, rows, h, shared // mesh.tp)
    # Sent, received and sorted copies of the dispatched tokens, once more for their gradients.
    dispatch = round(copies * a * h * (4 if mesh.ep > 1 else 2))
    return Kept(rest=0, modules=modules, transient=dispatch)
