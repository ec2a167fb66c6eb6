"""The fp32 router: sigmoid with an aux-loss-free expert bias, or softmax with a balance loss.

megatron's own router keeps expert counts in a float buffer, knows no zero-mean bias update and
normalises its losses per micro batch. Here counts are integers of the whole step, padding tokens
do not count, and z-loss and balance loss are means over the tokens of the global batch under every
layout (docs/decisions/0013-balance-loss.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_train.config import ModelConfig
from ring_train.ops.backends import resolve_backend
from ring_train.ops.router import (
    RoutingRule,
    expert_bias_update,
    expert_scores,
    relative_load,
    router_logits,
    routing,
    routing_margin,
    z_loss_sum,
)


class ExpertRouter(Router):
    """Group-limited top-k over the scores of experts (model-spec 2.3).

    Attributes:
        expert_bias: [e] fp32 buffer that takes part in the selection only; saved in checkpoints,
            changed only by `finish_router_step`. None without `moe_router_enable_expert_bias`.
        expert_load: [e] fp32 buffer, tokens of each expert in the step before over their mean; what
            the balance loss weighs scores with. Saved in checkpoints. None without that loss.
        tokens_per_expert: [e] int64 tokens of this rank since the last update; not saved.
        tokens_per_step: tokens of the global batch without padding; set before each step.
        margin: smallest routing margin seen since `track_margin` was set.
        token_margins: those of all tokens, [t] for each forward since then.
    """

    expert_bias: Any
    expert_load: Any
    tokens_per_expert: torch.Tensor
    score_sums: torch.Tensor
    z_loss: torch.Tensor

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        model: ModelConfig,
        is_mtp_layer: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.model, self.backend = model, backend
        experts = config.num_moe_experts or 0
        bias = torch.zeros(experts) if model.moe_router_enable_expert_bias else None
        load = torch.ones(experts) if model.moe_aux_loss_coeff else None
        self.register_buffer("expert_bias", bias)
        self.register_buffer("expert_load", load, persistent=False)
        for name, size, dtype in (
            ("tokens_per_expert", (experts,), torch.int64),
            ("score_sums", (experts,), torch.float64),
            ("z_loss", (), torch.float64),
        ):
            self.register_buffer(name, torch.zeros(size, dtype=dtype), persistent=False)
        self.tokens_per_step = 1
        self.track_margin = False
        self.margin = float("inf")
        self.token_margins: list[torch.Tensor] = []

    def forward(  # pyrefly: ignore[bad-override]  # the base class leaves the arguments open
        self, input: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (probs [t, e] fp32, zero where not selected; routing map [t, e] bool).

        Args:
            input: [t/sp, 1, h], normalised block input.
            padding_mask: [t/sp, 1] bool, True where the token is padding.
        """
        logits = self.gating(input).flatten(0, -2)  # [t, e] fp32
        valid = None if padding_mask is None else ~padding_mask.reshape(-1)
        probs, routing_map = self.routing(logits)
        if self.track_margin:
            self._observe_margin(logits, valid)
        if torch.is_grad_enabled():
            self._count(routing_map, valid)
            for loss in self._losses(logits, valid):
                probs = MoEAuxLossAutoScaler.apply(probs, loss / self.tokens_per_step)
        return probs, routing_map

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., e] fp32 (fp64) of hidden states [..., h]."""
        if resolve_backend(self.backend, input) == "torch":
            return super().gating(input)
        logits = router_logits(input.flatten(0, -2), self.weight, backend=self.backend)
        return logits.unflatten(0, input.shape[:-1])

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the scores [t, e] fp32 of logits [t, e]."""
        return expert_scores(logits, self.model.moe_router_score_function.value)

    def routing(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (probs, routing map), both [t, e], of fp32 logits [t, e]."""
        rule = RoutingRule(
            function=self.model.moe_router_score_function.value,
            topk=self.model.moe_router_topk,
            num_groups=self.model.moe_router_num_groups,
            group_topk=self.model.moe_router_group_topk,
            scaling_factor=self.model.moe_router_topk_scaling_factor,
        )
        return routing(logits, self.expert_bias, rule, backend=self.backend)

    def _count(self, routing_map: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Add this call's tokens per expert. Runs once per token also under recomputation."""
        counted = routing_map if valid is None else routing_map & valid[:, None]
        self.tokens_per_expert += counted.sum(0)

    def _losses(self, logits: torch.Tensor, valid: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """Yield the losses of the router summed over tokens, coefficients applied; keep sums."""
        if self.model.moe_z_loss_coeff:
            z_sum = z_loss_sum(logits, valid)
            self.z_loss += z_sum.detach()
            yield self.model.moe_z_loss_coeff * z_sum
        if self.expert_load is not None:
            scores = self.scores(logits)
            shares = scores / scores.sum(-1, keepdim=True)
            if valid is not None:
                shares = shares.masked_fill(~valid[:, None], 0.0)
            sums = shares.sum(0)  # [e]
            self.score_sums += sums.detach()
            yield self.model.moe_aux_loss_coeff * (sums * self.expert_load).sum()

    @torch.no_grad()
    def _observe_margin(self, logits: torch.Tensor, valid: torch.Tensor | None) -> None:
        scores = self.scores(logits)
        margins = routing_margin(
            scores if self.expert_bias is None else scores + self.expert_bias,
            topk=self.model.moe_router_topk,
            num_groups=self.model.moe_router_num_groups,
            group_topk=self.model.moe_router_group_topk,
        )
        self.token_margins.append(margins)
        seen = margins if valid is None else margins[valid]
        if len(seen):
            self.margin = min(self.margin, float(seen.min()))

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertRouter:
        """Move like any module, but keep the dtype of every buffer whatever the cast."""
        kept = list(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in kept:
            setattr(self, name, buffer.to(device=self.weight.device))
        return self


def routers(chunks: Iterable[torch.nn.Module]) -> Iterator[ExpertRouter]:
    """Yield every router of the given model chunks, in module order."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ExpertRouter):
                yield module


def begin_router_step(chunks: Iterable[torch.nn.Module], tokens_per_step: int) -> None:
    """Reset the sums and set the divisor of the losses: non-padding tokens of the batch."""
    for router in routers(chunks):
        router.tokens_per_step = max(tokens_per_step, 1)
        for total in (router.tokens_per_expert, router.score_sums, router.z_loss):
            total.zero_()


@dataclass(frozen=True)
class RouterLoad:
    """How one router used its experts in a step, over the global batch; no coefficient applied."""

    counts: torch.Tensor
    """[e] int64 tokens per expert, padding excluded."""
    z_loss: torch.Tensor
    """Mean over tokens of logsumexp(logits)^2, fp64; 0 where its coefficient is 0."""
    balance_loss: torch.Tensor | None = None
    """Sum over experts of load times mean share of the scores, both of this step, fp64; 1 when
    balanced, e / k at worst. None where its coefficient is 0."""


@torch.no_grad()
def finish_router_step(
    chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection, bias_update_rate: float
) -> dict[int, RouterLoad]:
    """Update expert bias and load of each router; return {layer number: load} of this stage.

    Collective over tensor x data x context parallel ranks. MTP depths count on from L + 1.

    Args:
        chunks: model chunks of this rank.
        groups: process groups.
        bias_update_rate: how far an expert bias moves; 0 = not at all.
    """
    found = list(routers(chunks))
    if not found:
        return {}
    counts = torch.stack([router.tokens_per_expert for router in found])  # [layers, e] int64
    losses = [torch.cat([router.z_loss[None], router.score_sums]) for router in found]
    sums = torch.stack(losses)  # [layers, 1 + e] fp64
    torch.distributed.all_reduce(counts, group=groups.tp_dp_cp)
    torch.distributed.all_reduce(sums, group=groups.tp_dp_cp)
    loads = {}
    for router, count, means in zip(found, counts, sums / found[0].tokens_per_step, strict=True):
        model = router.model
        if router.expert_bias is not None and bias_update_rate:
            updated = expert_bias_update(
                router.expert_bias,
                count,
                rate=bias_update_rate,
                zero_mean=model.moe_router_bias_zero_mean,
            )
            router.expert_bias.copy_(updated)
        balance_loss = None
        if router.expert_load is not None:
            load = relative_load(count)
            router.expert_load.copy_(load)
            balance_loss = (load * means[1:]).sum()
        number = int(router.layer_number or 0) + model.num_layers * router.is_mtp_layer
        loads[number] = RouterLoad(count, means[0], balance_loss)
    return loads
