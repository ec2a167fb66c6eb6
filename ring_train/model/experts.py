"""Mixture of experts: grouped, with a direct path where all experts are on this rank.

megatron's dispatcher and `SequentialMLP` pass the tokens of each expert through some twenty tensor
operations and modules, whose cost does not depend on the number of tokens: with a token per
sequence, as in generation, it is nearly all of the cost. Grouped experts are multiplied all at
once; where they are all on this rank, no dispatcher is asked.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_train.config import FlexDispatcher, KernelsConfig, TokenDispatcher
from ring_train.ops.grouped import grouped_linear
from ring_train.ops.permutation import (
    make_permutation,
    permute_tokens,
    permute_weights,
    unpermute_tokens,
)
from ring_train.ops.swiglu import weighted_swiglu
from ring_train.plan import PlanError

DISPATCHER_LIBRARIES = {
    FlexDispatcher.deepep: ("deep_ep", "Buffer"),
    FlexDispatcher.hybridep: ("deep_ep", "HybridEPBuffer"),
}
"""(module, what megatron-core takes from it) of each backend of the dispatcher `flex`."""


class MixtureOfExperts(MoELayer):
    """megatron's layer; without its dispatcher where all experts are grouped on this rank."""

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        are_here = pg_collection.tp_ep.size() == 1 and not self.shared_expert_overlap
        self.is_direct = are_here and isinstance(self.experts, GroupedExperts)

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
        if not self.is_direct:
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        mask = None if padding_mask is None else padding_mask.mT
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(self._direct, False, hidden_states, mask), None
        return self._direct(hidden_states, mask), None

    def _direct(self, hidden_states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Return the output [t/sp, 1, h] without a dispatcher."""
        shared: Any = self.shared_experts_compute(hidden_states)
        routing: Any = self.route(hidden_states, mask)
        probs, routing_map = routing  # [t/sp, e] twice
        tokens = hidden_states.flatten(0, -2)  # [t/sp, h]
        experts: Any = self.experts
        permutation = make_permutation(routing_map, self.config.moe_router_topk)
        rows = permute_tokens(tokens, permutation, backend=experts.backend)  # [t/sp k, h]
        parts, _ = experts(rows, permutation.counts, permute_weights(probs, permutation))
        output = unpermute_tokens(parts, permutation, backend=experts.backend)
        output = output.view_as(hidden_states)
        return output if shared is None else output + shared


class GroupedExperts(MegatronModule):
    """The experts of a rank in two stacked parameters, each multiplied in one grouped product.

    Attributes:
        weight1: [e/ep, 2f/etp, h], gate over up; cut like the fc1 of an expert.
        weight2: [e/ep, h, f/etp], cut like its fc2.
        backend: of what surrounds the products, see `ops.backends`.

    `model.tensors` gives each expert's part the name that it has in megatron's `SequentialMLP`.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        backend: str = "auto",
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        self.backend = backend
        inner = (config.moe_ffn_hidden_size or 0) // pg_collection.expt_tp.size()
        h = config.hidden_size
        self.weight1 = _stacked(config, (num_local_experts, 2 * inner, h), cut_dim=1)
        self.weight2 = _stacked(config, (num_local_experts, h, inner), cut_dim=2)

    def forward(
        self,
        permuted_local_hidden_states: torch.Tensor,
        tokens_per_expert: torch.Tensor,
        permuted_probs: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (outputs [t, h] times their probabilities, None).

        Args:
            permuted_local_hidden_states: [t, h], the tokens of the first expert first.
            tokens_per_expert: [experts on this rank] int64, on any device; what is behind their sum
                is undefined in the output.
            permuted_probs: [t] fp32.
        """
        inner = grouped_linear(permuted_local_hidden_states, self.weight1, tokens_per_expert)
        inner = weighted_swiglu(inner, permuted_probs, backend=self.backend)  # [t, f/etp]
        return grouped_linear(inner, self.weight2, tokens_per_expert), None


def _stacked(
    config: TransformerConfig, shape: tuple[int, int, int], *, cut_dim: int
) -> torch.nn.Parameter:
    """Return a parameter with the tags that megatron gives to that of an expert."""
    parameter: Any = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
    # False: in buckets of their own, whose gradients expert-data-parallel ranks add up.
    has_own_groups = config.expert_model_parallel_size > 1 or (
        config.expert_tensor_parallel_size != config.tensor_model_parallel_size
    )
    parameter.allreduce = not has_own_groups
    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=cut_dim, stride=1)
    return parameter


def check_dispatcher(kernels: KernelsConfig) -> None:
    """Raise PlanError where the library behind the chosen dispatcher is not there."""
    if kernels.moe_token_dispatcher_type is not TokenDispatcher.flex:
        return
    backend = kernels.moe_flex_dispatcher_backend
    module, name = DISPATCHER_LIBRARIES[backend]
    try:
        found = hasattr(importlib.import_module(module), name)
    except ImportError:
        found = False
    if not found:
        problem = (
            f"kernels.moe_token_dispatcher_type=flex with kernels.moe_flex_dispatcher_backend="
            f"{backend.value} needs {module}.{name} of DeepEP, which cannot be imported here; "
            "install it, or choose kernels.moe_token_dispatcher_type=alltoall"
        )
        raise PlanError([problem])
