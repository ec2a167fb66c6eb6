"""The fp32 sigmoid router with an aux-loss-free expert bias (model-spec 2.3).

megatron's own router keeps expert counts in a float buffer, knows no zero-mean bias update and
normalises the z-loss per micro batch. Here counts are integers of the whole step, padding tokens
do not count, and the z-loss is a mean over the tokens of the global batch under every layout.
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
from ring_train.ops.router import expert_bias_update, routing_margin, sigmoid_routing, z_loss_sum


class SigmoidRouter(Router):
    """Group-limited top-k over sigmoid scores; the bias takes part in the selection only.

    Attributes:
        expert_bias: [e] fp32 buffer, saved in checkpoints, changed only by `finish_router_step`.
        tokens_per_expert: [e] int64 tokens of this rank since the last update; not saved.
        tokens_per_step: tokens of the global batch without padding; set before each step.
        margin: smallest routing margin seen since `track_margin` was set; for tests and `score`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        model: ModelConfig,
        is_mtp_layer: bool = False,
    ) -> None:
        super().__init__(config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.model = model
        experts = config.num_moe_experts or 0
        self.register_buffer("expert_bias", torch.zeros(experts, dtype=torch.float32))
        self.register_buffer(
            "tokens_per_expert", torch.zeros(experts, dtype=torch.int64), persistent=False
        )
        self.register_buffer("z_loss", torch.zeros((), dtype=torch.float64), persistent=False)
        self.tokens_per_step = 1
        self.track_margin = False
        self.margin = float("inf")

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
            if self.model.moe_z_loss_coeff:
                z_sum = z_loss_sum(logits, valid)
                self.z_loss += z_sum.detach()
                scale = self.model.moe_z_loss_coeff / self.tokens_per_step
                probs = MoEAuxLossAutoScaler.apply(probs, z_sum * scale)
        return probs, routing_map

    def routing(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (probs, routing map), both [t, e], of fp32 logits [t, e]."""
        return sigmoid_routing(
            logits,
            self.expert_bias,
            topk=self.model.moe_router_topk,
            num_groups=self.model.moe_router_num_groups,
            group_topk=self.model.moe_router_group_topk,
            scaling_factor=self.model.moe_router_topk_scaling_factor,
        )

    def _count(self, routing_map: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Add this call's tokens per expert. Runs once per token also under recomputation."""
        counted = routing_map if valid is None else routing_map & valid[:, None]
        self.tokens_per_expert += counted.sum(0)

    @torch.no_grad()
    def _observe_margin(self, logits: torch.Tensor, valid: torch.Tensor | None) -> None:
        logits = logits if valid is None else logits[valid]
        if len(logits):
            margin = routing_margin(
                logits.sigmoid() + self.expert_bias,
                topk=self.model.moe_router_topk,
                num_groups=self.model.moe_router_num_groups,
                group_topk=self.model.moe_router_group_topk,
            )
            self.margin = min(self.margin, float(margin))

    def _apply(self, fn: Any, recurse: bool = True) -> SigmoidRouter:
        """Move like any module, but keep the bias in fp32 whatever the cast."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        self.expert_bias = bias.to(device=self.expert_bias.device)
        return self


def routers(chunks: Iterable[torch.nn.Module]) -> Iterator[SigmoidRouter]:
    """Yield every router of the given model chunks, in module order."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, SigmoidRouter):
                yield module


def begin_router_step(chunks: Iterable[torch.nn.Module], tokens_per_step: int) -> None:
    """Reset the counters and set the divisor of the z-loss: non-padding tokens of the batch."""
    for router in routers(chunks):
        router.tokens_per_step = max(tokens_per_step, 1)
        router.tokens_per_expert.zero_()
        router.z_loss.zero_()


@dataclass(frozen=True)
class RouterLoad:
    """How one router used its experts in a step, over the global batch."""

    counts: torch.Tensor
    """[e] int64 tokens per expert, padding excluded."""
    z_loss: torch.Tensor
    """Mean over tokens of logsumexp(logits)^2, fp64; the coefficient is not applied."""


@torch.no_grad()
def finish_router_step(
    chunks: Sequence[torch.nn.Module], groups: ProcessGroupCollection, bias_update_rate: float
) -> dict[int, RouterLoad]:
    """Apply one bias update per router; return {layer number: load} of this pipeline stage.

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
    z_sums = torch.stack([router.z_loss for router in found])  # [layers] fp64
    torch.distributed.all_reduce(counts, group=groups.tp_dp_cp)
    torch.distributed.all_reduce(z_sums, group=groups.tp_dp_cp)
    loads = {}
    for router, count, z_sum in zip(found, counts, z_sums, strict=True):
        model = router.model
        if model.moe_router_enable_expert_bias and bias_update_rate:
            updated = expert_bias_update(
                router.expert_bias,
                count,
                rate=bias_update_rate,
                zero_mean=model.moe_router_bias_zero_mean,
            )
            router.expert_bias.copy_(updated)
        number = int(router.layer_number or 0) + model.num_layers * router.is_mtp_layer
        loads[number] = RouterLoad(count, z_sum / router.tokens_per_step)
    return loads
