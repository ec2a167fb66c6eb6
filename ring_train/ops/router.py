"""Top-k routing over sigmoid or softmax scores, its margin, losses and expert-bias update.

Experts are chosen by score plus expert bias; the weights use the score alone. Triton's kernels
compute scores with another exponential function, and of equal scores choose the first expert:
where the margin is above rounding, both backends choose the same.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ring_train.ops.backends import resolve_backend
from ring_train.ops.precision import compute_dtype

_SUM_FLOOR = 1e-20


class RoutingRule(NamedTuple):
    """How experts are chosen and weighed."""

    function: str
    """Of `expert_scores`."""
    topk: int
    """Experts per token."""
    num_groups: int | None
    """See `group_limited_topk`."""
    group_topk: int | None
    """See `group_limited_topk`."""
    scaling_factor: float
    """On all weights."""


def router_logits(
    x: Float[Tensor, "t h"], weight: Float[Tensor, "e h"], *, backend: str = "auto"
) -> Float[Tensor, "t e"]:
    """Return x @ weight.T in fp32, or fp64 for fp64 inputs, of whatever dtypes.

    Differentiable in both; gradients are summed in fp32 and have the dtypes of what they are of.

    Raises:
        ValueError: shapes, dtypes or the backend do not fit.
    """
    if x.shape[1] != weight.shape[1] or x.device != weight.device:
        raise ValueError(
            f"x={tuple(x.shape)} on {x.device} does not fit weight={tuple(weight.shape)} on "
            f"{weight.device}; give [t, h] and [e, h]"
        )
    dtype = torch.promote_types(compute_dtype(x.dtype), compute_dtype(weight.dtype))
    wider = x if torch.promote_types(x.dtype, weight.dtype) == x.dtype else weight
    if resolve_backend(backend, wider) == "triton":
        return _Logits.apply(x, weight)
    return torch.mm(x.to(dtype), weight.to(dtype).t())


def routing(
    logits: Float[Tensor, "t e"],
    expert_bias: Float[Tensor, " e"] | None,
    rule: RoutingRule,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "t e"], Bool[Tensor, "t e"]]:
    """Return what `topk_routing` makes of the scores of logits. Differentiable in `logits`.

    Args:
        logits: of `router_logits`.
        expert_bias: one per expert, or None.
        rule: scores, choice and weights.
        backend: auto, torch or triton.

    Raises:
        ValueError: the rule does not fit the experts, or the backend is not there.
    """
    function, topk, num_groups, group_topk, scaling_factor = rule
    if resolve_backend(backend, logits) == "triton":
        _check_bias(logits, expert_bias)
        _check_groups(logits, topk, num_groups, group_topk)
        _check_function(function)
        return _routed(logits, expert_bias, rule)
    return topk_routing(
        expert_scores(logits, function),
        expert_bias,
        topk=topk,
        num_groups=num_groups,
        group_topk=group_topk,
        scaling_factor=scaling_factor,
    )


def group_limited_topk(
    scores_for_choice: Float[Tensor, "t e"],
    *,
    topk: int,
    num_groups: int | None,
    group_topk: int | None,
) -> Int[Tensor, "t k"]:
    """Return the `topk` experts of each token, best first, from its `group_topk` best groups.

    A group is a run of e / num_groups experts; its score is the sum of its topk // group_topk
    largest. Without groups this is a plain top-k.

    Source: inclusionAI/Ling-V2 @ af8837e `modeling_bailing_moe_v2.py`, BailingMoeV2Gate (which
    fixes 2 per group); megatron-core `transformer/moe/moe_utils.py`.
    """
    _check_groups(scores_for_choice, topk, num_groups, group_topk)
    if num_groups is not None and group_topk is not None:
        group_scores = _group_scores(scores_for_choice, topk // group_topk, num_groups)
        kept = _chosen(group_scores, group_scores.topk(group_topk, dim=-1).indices)
        scores_for_choice = _without_groups(scores_for_choice, ~kept)
    return scores_for_choice.topk(topk, dim=-1).indices


def expert_scores(logits: Float[Tensor, "t e"], function: str) -> Float[Tensor, "t e"]:
    """Return the score of every expert, fp32 or fp64: "sigmoid" of its logit, or "softmax" of all.

    Source: inclusionAI/Ling-V2 @ af8837e `modeling_bailing_moe_v2.py`, BailingMoeV2Gate, and
    inclusionAI/Ring @ 3b256cc `modeling_bailing_moe.py`, BailingMoeGate.
    """
    _check_function(function)
    logits = logits.to(compute_dtype(logits.dtype))
    return torch.softmax(logits, dim=-1) if function == "softmax" else torch.sigmoid(logits)


def topk_routing(
    scores: Float[Tensor, "t e"],
    expert_bias: Float[Tensor, " e"] | None,
    *,
    topk: int,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float,
) -> tuple[Float[Tensor, "t e"], Bool[Tensor, "t e"]]:
    """Return the weight of every expert (0 where not chosen, fp32 or fp64) and the routing map.

    The weights of a token are its chosen scores over (their sum + 1e-20), times `scaling_factor`;
    for topk = 1 they are not divided, else the router had no gradient. The bias moves the choice
    only. Differentiable in `scores`.

    Args:
        scores: of `expert_scores`.
        expert_bias: one per expert, or None.
        topk: experts per token.
        num_groups: see `group_limited_topk`.
        group_topk: see `group_limited_topk`.
        scaling_factor: on all weights.
    """
    _check_bias(scores, expert_bias)
    with torch.no_grad():
        biased = scores if expert_bias is None else scores + expert_bias
        indices = group_limited_topk(
            biased, topk=topk, num_groups=num_groups, group_topk=group_topk
        )
    chosen = scores.gather(-1, indices)  # [t, k]
    if topk > 1:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + _SUM_FLOOR)
    weights = torch.zeros_like(scores).scatter(-1, indices, scaling_factor * chosen)
    return weights, _chosen(scores, indices)


def routing_margin(
    scores_for_choice: Float[Tensor, "t e"],
    *,
    topk: int,
    num_groups: int | None,
    group_topk: int | None,
) -> Float[Tensor, " t"]:
    """Return the smallest gap of each token between a chosen and a rejected expert or group.

    Experts are compared within the kept groups. Rounding far below this flips no expert; inf where
    nothing is rejected.
    """
    _check_groups(scores_for_choice, topk, num_groups, group_topk)
    margin = scores_for_choice.new_full(scores_for_choice.shape[:1], torch.inf)
    if num_groups is not None and group_topk is not None:
        group_scores = _group_scores(scores_for_choice, topk // group_topk, num_groups)
        margin = torch.minimum(margin, _gap(group_scores, group_topk))
        kept = _chosen(group_scores, group_scores.topk(group_topk, dim=-1).indices)
        scores_for_choice = _without_groups(scores_for_choice, ~kept)
    return torch.minimum(margin, _gap(scores_for_choice, topk))


def z_loss_sum(
    logits: Float[Tensor, "t e"], mask: Bool[Tensor, " t"] | None = None
) -> Float[Tensor, ""]:
    """Return the sum of logsumexp(logits) ** 2 over the tokens where `mask` is true, fp32 or fp64.

    The caller divides by the global number of tokens and multiplies by the coefficient.
    """
    if mask is not None and mask.shape != logits.shape[:1]:
        raise ValueError(
            f"mask={tuple(mask.shape)} does not match logits={tuple(logits.shape)}; give one flag "
            "per token"
        )
    squares = torch.logsumexp(logits.to(compute_dtype(logits.dtype)), dim=-1).square()
    return squares.sum() if mask is None else squares.masked_fill(~mask, 0.0).sum()


def relative_load(counts: Int[Tensor, " e"]) -> Float[Tensor, " e"]:
    """Return the tokens of each expert over their mean, fp64; ones where no token was counted."""
    total = counts.sum()
    load = counts.double() * counts.shape[-1] / total.clamp(min=1)
    return torch.where(total > 0, load, 1.0)


def expert_bias_update(
    bias: Float[Tensor, "*layers e"],
    counts: Int[Tensor, "*layers e"],
    *,
    rate: float,
    zero_mean: bool,
) -> Float[Tensor, "*layers e"]:
    """Return the bias after one optimizer step, moved by `rate` towards the starved experts.

    The direction is sign(mean(counts) - counts), from integers alone, so every rank and layout
    agrees on it.

    Args:
        bias: fp32 expert bias.
        counts: int64 tokens of each expert in the global batch.
        rate: step of one update.
        zero_mean: subtract the mean direction of the layer, so that the mean bias stays.
    """
    if counts.shape != bias.shape or counts.is_floating_point():
        raise ValueError(
            f"counts {tuple(counts.shape)} {counts.dtype} do not fit bias={tuple(bias.shape)}; "
            "give one integer per expert"
        )
    counts = counts.long()
    excess = counts.shape[-1] * counts - counts.sum(-1, keepdim=True)
    direction = -torch.sign(excess).to(bias.dtype)
    if zero_mean:
        direction = direction - direction.mean(-1, keepdim=True)
    return bias + rate * direction


def _check_function(function: str) -> None:
    if function not in ("sigmoid", "softmax"):
        raise ValueError(f"function={function!r} gives no scores; choose sigmoid or softmax")


def _check_bias(scores: Tensor, expert_bias: Tensor | None) -> None:
    if expert_bias is not None and expert_bias.shape != scores.shape[-1:]:
        raise ValueError(
            f"expert_bias={tuple(expert_bias.shape)} does not match scores={tuple(scores.shape)}; "
            "give one bias per expert"
        )


def _check_groups(
    scores: Tensor, topk: int, num_groups: int | None, group_topk: int | None
) -> None:
    compute_dtype(scores.dtype)
    experts = scores.shape[-1]
    given = f"topk={topk} of {experts} experts, num_groups={num_groups}, group_topk={group_topk}"
    if not 1 <= topk <= experts:
        raise ValueError(f"{given}: topk is not within the experts; choose 1 to {experts}")
    if (num_groups is None) != (group_topk is None):
        raise ValueError(f"{given}: groups need both numbers; give both or neither")
    if num_groups is None or group_topk is None:
        return
    if num_groups < 1 or experts % num_groups or not 1 <= group_topk <= num_groups:
        raise ValueError(
            f"{given}: choose num_groups that divides the experts, and group_topk from 1 to it"
        )
    group_size = experts // num_groups
    if not 1 <= topk // group_topk <= group_size or group_topk * group_size < topk:
        raise ValueError(
            f"{given}: topk // group_topk must be 1 to {group_size} experts of a group, and "
            "topk must fit in the kept groups"
        )


def _group_scores(scores: Tensor, per_group: int, num_groups: int) -> Float[Tensor, "t groups"]:
    return scores.unflatten(-1, (num_groups, -1)).topk(per_group, dim=-1).values.sum(-1)


def _without_groups(scores: Tensor, dropped: Bool[Tensor, "t groups"]) -> Float[Tensor, "t e"]:
    grouped = scores.unflatten(-1, (dropped.shape[-1], -1))
    return grouped.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(-2)


def _chosen(scores: Tensor, indices: Int[Tensor, "t k"]) -> Bool[Tensor, "t e"]:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, indices, True)


def _gap(scores: Float[Tensor, "t e"], chosen: int) -> Float[Tensor, " t"]:
    """Return the difference of the `chosen`-th and the next largest score of each token."""
    if chosen == scores.shape[-1]:
        return scores.new_full(scores.shape[:1], torch.inf)
    best = scores.topk(chosen + 1, dim=-1).values
    return best[:, -2] - best[:, -1]


class _Logits(torch.autograd.Function):
    """`router_logits` by Triton's kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        from ring_train.ops.kernels.router import make_logits

        ctx.save_for_backward(x, weight)
        return make_logits(x, weight)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override] -- once_differentiable hides the name of ctx
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        from ring_train.ops.kernels.router import make_input_gradient, make_weight_gradient

        x, weight = ctx.saved_tensors
        of_input, of_weight = ctx.needs_input_grad
        return (
            make_input_gradient(grad, weight, x.dtype) if of_input else None,
            make_weight_gradient(grad, x, weight.dtype) if of_weight else None,
        )


def _routed(logits: Tensor, expert_bias: Tensor | None, rule: RoutingRule) -> tuple[Tensor, Tensor]:
    """Return `routing` by Triton's kernels."""
    from ring_train.ops.kernels.router import MAX_LANES, Choice

    function, topk, num_groups, group_topk, scaling_factor = rule
    softmax = function == "softmax"
    choice = Choice(softmax, topk, num_groups or 1, group_topk or 1, scaling_factor)
    if choice.lanes(logits.shape[1]) > MAX_LANES:
        raise ValueError(
            f"logits={tuple(logits.shape)}: backend='triton' has up to {MAX_LANES} experts, groups "
            "padded to powers of two; choose backend='torch'"
        )
    if expert_bias is not None:
        expert_bias = expert_bias.detach().contiguous()
    return _Routing.apply(logits.contiguous(), expert_bias, choice)


class _Routing(torch.autograd.Function):
    """`routing` by Triton's kernels."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, expert_bias: Tensor | None, choice: Any
    ) -> tuple[Tensor, Tensor]:
        from ring_train.ops.kernels.router import make_routing

        weights, chosen = make_routing(logits, expert_bias, choice)
        ctx.save_for_backward(logits, chosen)
        ctx.mark_non_differentiable(chosen)
        ctx.set_materialize_grads(False)
        ctx.choice = choice
        return weights, chosen

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override] -- once_differentiable hides the name of ctx
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor, None, None]:
        from ring_train.ops.kernels.router import make_routing_gradient

        logits, chosen = ctx.saved_tensors
        return make_routing_gradient(logits, chosen, grad.contiguous(), ctx.choice), None, None
