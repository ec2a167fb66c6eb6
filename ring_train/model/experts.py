"""Mixture of experts: one by one or grouped, with a direct path where all experts are here.

megatron's dispatcher and `SequentialMLP` pass the tokens of each expert through some twenty tensor
operations and modules, whose cost does not depend on the number of tokens: with a token per
sequence, as in generation, it is nearly all of the cost. In eval mode and without gradients the
same products are formed directly, bit-equal, wherever an expert is what megatron's default is.
Grouped experts are multiplied all at once; where they are all on this rank, no dispatcher is asked
in training either.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_train.config import ExpertKernel, FlexDispatcher, KernelsConfig, TokenDispatcher
from ring_train.ops.grouped import grouped_linear
from ring_train.ops.permutation import (
    make_permutation,
    permute_tokens,
    permute_weights,
    unpermute_tokens,
)
from ring_train.ops.swiglu import weighted_swiglu
from ring_train.plan import Plan, PlanError

DISPATCHER_LIBRARIES = {
    FlexDispatcher.deepep: ("deep_ep", "Buffer"),
    FlexDispatcher.hybridep: ("deep_ep", "HybridEPBuffer"),
}
"""(module, what megatron-core takes from it) of each backend of the dispatcher `flex`."""


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
        experts: Any = None
        if self.is_local and isinstance(self.experts, GroupedExperts):
            experts = self._grouped_experts
        elif self.is_local and isinstance(self.experts, Experts) and self.experts.is_direct():
            experts = self._sequential_experts
        if experts is None:
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        compute = partial(self._direct, experts)
        mask = None if padding_mask is None else padding_mask.mT
        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(compute, False, hidden_states, mask), None
        return compute(hidden_states, mask), None

    def _direct(
        self, experts: Any, hidden_states: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the output [t/sp, 1, h] without a dispatcher."""
        shared: Any = self.shared_experts_compute(hidden_states)
        routing: Any = self.route(hidden_states, mask)
        probs, routing_map = routing  # [t/sp, e] twice
        tokens = hidden_states.flatten(0, -2)  # [t/sp, h]
        output = experts(tokens, probs, routing_map).view_as(hidden_states)
        return output if shared is None else output + shared

    def _sequential_experts(
        self, tokens: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> torch.Tensor:
        number, token = routing_map.mT.nonzero(as_tuple=True)  # by expert, then by token
        counts = torch.bincount(number, minlength=routing_map.shape[1])
        experts: Any = self.experts
        parts, _ = experts(tokens[token], counts, probs[token, number])
        return torch.zeros_like(tokens).index_add_(0, token, parts)

    def _grouped_experts(
        self, tokens: torch.Tensor, probs: torch.Tensor, routing_map: torch.Tensor
    ) -> torch.Tensor:
        permutation = make_permutation(routing_map, self.config.moe_router_topk)
        rows = permute_tokens(tokens, permutation)  # [t/sp k, h]
        experts: Any = self.experts
        parts, _ = experts(rows, permutation.counts, permute_weights(probs, permutation))
        return unpermute_tokens(parts, permutation)


class Experts(SequentialMLP):
    """`SequentialMLP`, with a direct path; empty experts cost nothing on it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # An adapter in place of a projection changes what an expert computes, too.
        self.is_plain = not _unusual_fields(self.config) and all(
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


class GroupedExperts(MegatronModule):
    """The experts of a rank in two stacked parameters, each multiplied in one grouped product.

    Attributes:
        weight1: [e/ep, 2f/etp, h], gate over up; cut like the fc1 of an expert.
        weight2: [e/ep, h, f/etp], cut like its fc2.

    `model.tensors` gives each expert's part the name that it has in `Experts`.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        super().__init__(config)
        unusual = _unusual_fields(config)
        if unusual:
            problem = (
                f"kernels.experts=grouped does not compute model.megatron {unusual}; remove them, "
                "or choose kernels.experts=sequential"
            )
            raise PlanError([problem])
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
        inner = weighted_swiglu(inner, permuted_probs)  # [t, f/etp]
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


def _unusual_fields(config: TransformerConfig) -> list[str]:
    """Return the fields by which an expert is not SwiGLU between two products."""
    names = ("fp8", "fp4", "moe_apply_probs_on_input", "glu_linear_offset")
    found = [name for name in names if getattr(config, name)]
    clamp = "activation_func_clamp_value"
    return found + [clamp] * (getattr(config, clamp) is not None)


def are_grouped(plan: Plan, config: TransformerConfig) -> bool:
    """Return whether the routed experts of a run are `GroupedExperts`."""
    chosen = plan.config.kernels.experts
    if chosen is not ExpertKernel.auto:
        return chosen is ExpertKernel.grouped
    adapted = any(name.startswith("experts.") for name in plan.config.lora.targets)
    has_adapters = plan.lora is not None and adapted
    return torch.cuda.is_available() and not has_adapters and not _unusual_fields(config)


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
