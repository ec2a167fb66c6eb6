"""Mixture of experts, with a direct path for forwards that are not trained.

megatron's dispatcher and `SequentialMLP` pass the tokens of each expert through some twenty tensor
operations and modules, whose cost does not depend on the number of tokens: with a token per
sequence, as in generation, it is nearly all of the cost. In eval mode and without gradients the
same products are formed directly, bit-equal, wherever an expert is what megatron's default is.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer


class MixtureOfExperts(MoELayer):
    """megatron's layer; with all experts on this rank, without its dispatcher where possible."""

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        self.is_local = pg_collection.tp_ep.size() == 1 and not (
            self.shared_expert_overlap or self.config.moe_latent_size
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        intermediate_tensors: Any = None,
        padding_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (output [t/sp, 1, h], None).

        Args:
            hidden_states: [t/sp, 1, h], normalised block input.
            intermediate_tensors: of megatron's CUDA graphs; None here.
            padding_mask: [1, t/sp] bool, True where padding.
        """
        experts = self.experts
        if not (self.is_local and isinstance(experts, Experts) and experts.is_direct()):
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        mask = None if padding_mask is None else padding_mask.mT
        shared: Any = self.shared_experts_compute(hidden_states)
        routing: Any = self.route(hidden_states, mask)
        probs, routing_map = routing  # [t/sp, e] twice
        tokens = hidden_states.flatten(0, -2)  # [t/sp, h]
        number, token = routing_map.mT.nonzero(as_tuple=True)  # by expert, then by token
        counts = torch.bincount(number, minlength=routing_map.shape[1])
        parts, _ = experts(tokens[token], counts, probs[token, number])
        output = torch.zeros_like(tokens).index_add_(0, token, parts).view_as(hidden_states)
        return output if shared is None else output + shared, None


class Experts(SequentialMLP):
    """`SequentialMLP`, with a direct path; empty experts cost nothing on it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        # Each of these, and an adapter in place of a projection, changes what an expert computes.
        self.is_plain = not (
            config.fp8
            or config.fp4
            or config.moe_apply_probs_on_input
            or config.activation_func_clamp_value is not None
            or config.glu_linear_offset
        ) and all(
            type(expert.linear_fc1) is ColumnParallelLinear
            and type(expert.linear_fc2) is RowParallelLinear
            for expert in self.local_experts
        )

    def is_direct(self) -> bool:
        """Return whether a forward would take the direct path."""
        return self.is_plain and not self.training and not torch.is_grad_enabled()

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (outputs [t, h] times their probabilities, None).

        Args:
            permuted_local_hidden_states: [t, h], the tokens of the first expert first.
            tokens_per_expert: [experts on this rank] int64; they sum to t.
            permuted_probs: [t] fp32.
        """
        tokens, probs = permuted_local_hidden_states, permuted_probs
        if not self.is_direct() or not tokens.shape[0]:
            return super().forward(tokens, tokens_per_expert, probs)
        experts: Any = self.local_experts
        counts = tokens_per_expert.tolist()
        inner = _products(tokens, counts, [e.linear_fc1.weight for e in experts])  # [t, 2f/etp]
        gate, up = inner.chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        inner = (inner * probs.unsqueeze(-1)).to(inner.dtype)
        return _products(inner, counts, [e.linear_fc2.weight for e in experts]), None


def _products(x: torch.Tensor, counts: list[int], weights: list[torch.Tensor]) -> torch.Tensor:
    """Return [t, out] from x [t, in]: runs of so many tokens, each times its matrix [out, in]."""
    parts = zip(x.split(counts), counts, weights, strict=True)
    return torch.cat([torch.nn.functional.linear(part, w) for part, count, w in parts if count])
