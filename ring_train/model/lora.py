"""Low-rank adapters beside frozen projections: y = W x + scale * B (A x).

A tensor-parallel projection cuts one of the two matrices and copies the other. What a copy's
gradient is summed over depends on where its ranks see different tokens:

- sequence parallelism: the copy acts on this rank's part of the sequence, and megatron sums the
  gradients of parameters tagged `sequence_parallel` once per step;
- experts: the dispatcher gathers the tokens of expert-tensor-parallel ranks before the experts and
  adds up their outputs after them, so the copy sees all tokens but a part of the channels, and its
  gradient is summed in the backward pass.

What passes between ranks inside an adapter has `rank` channels, never the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch.nn.functional import linear

from ring_train.plan import Plan

ADAPTER_NAMES = ("lora_a", "lora_b")
"""Last part of the names of adapter parameters."""


class AdaptedColumnParallelLinear(ColumnParallelLinear):
    """A projection cut by output channels: A [r, in] on every rank, B [out/tp, r] cut."""

    def __init__(self, *args: Any, rank: int, scale: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale
        outputs = self.output_size_per_partition
        self.lora_a = _parameter(self, (rank, self.input_size), cut_dim=None)
        self.lora_b = _parameter(self, (outputs, rank), cut_dim=0)

    def forward(
        self, input_: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (output [t, .., out/tp], None) of input [t/sp, .., in]."""
        output, bias = super().forward(input_, *args, **kwargs)
        if self.explicit_expert_comm:
            a = copy_to_tensor_model_parallel_region(self.lora_a, group=self.tp_group)
            reduced = linear(input_, a)  # [t, r]
        else:
            reduced = linear(input_, self.lora_a)  # [t/sp, .., r]
            if self.sequence_parallel:
                reduced = gather_from_sequence_parallel_region(reduced, group=self.tp_group)
            else:
                reduced = copy_to_tensor_model_parallel_region(reduced, group=self.tp_group)
        return output + linear(reduced * self.scale, self.lora_b), bias


class AdaptedRowParallelLinear(RowParallelLinear):
    """A projection cut by input channels: A [r, in/tp] cut, B [out, r] on every rank."""

    def __init__(self, *args: Any, rank: int, scale: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale = scale
        inputs = self.input_size_per_partition
        self.lora_a = _parameter(self, (rank, inputs), cut_dim=1)
        self.lora_b = _parameter(self, (self.output_size, rank), cut_dim=None)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (output [t/sp, .., out], bias) of input [t, .., in/tp]."""
        output, bias = super().forward(input_)
        reduced = linear(input_, self.lora_a) * self.scale  # [t, .., r], of this rank's channels
        b = self.lora_b
        if self.explicit_expert_comm:
            b = copy_to_tensor_model_parallel_region(b, group=self.tp_group)
        elif self.sequence_parallel:
            reduced = reduce_scatter_to_sequence_parallel_region(reduced, group=self.tp_group)
        else:
            reduced = reduce_from_tensor_model_parallel_region(reduced, group=self.tp_group)
        return output + linear(reduced, b), bias


def _parameter(
    projection: ColumnParallelLinear | RowParallelLinear,
    shape: tuple[int, int],
    *,
    cut_dim: int | None,
) -> torch.nn.Parameter:
    """Return an adapter matrix with the tags of megatron; it is not initialised.

    Args:
        projection: what it belongs to: dtype, device and the groups of its gradient.
        shape: on this rank.
        cut_dim: dimension that is cut over tensor-parallel ranks, None for a copy on each.
    """
    weight: Any = projection.weight
    parameter: Any = torch.nn.Parameter(weight.new_empty(shape))
    parameter.allreduce = weight.allreduce  # False: reduced over expert-data-parallel ranks
    if cut_dim is not None:
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=cut_dim, stride=1)
    else:
        # Experts see whole sequences, see the module docstring.
        parameter.sequence_parallel = projection.sequence_parallel and not projection.is_expert
    return parameter


def column_parallel(plan: Plan, target: str) -> Callable[..., ColumnParallelLinear]:
    """Return the builder of a column-parallel projection, with an adapter if it is a target."""
    return _builder(plan, target, ColumnParallelLinear, AdaptedColumnParallelLinear)


def row_parallel(plan: Plan, target: str) -> Callable[..., RowParallelLinear]:
    """Return the builder of a row-parallel projection, with an adapter if it is a target."""
    return _builder(plan, target, RowParallelLinear, AdaptedRowParallelLinear)


def _builder(plan: Plan, target: str, plain: Any, adapted: Any) -> Any:
    if plan.lora is None or target not in plan.config.lora.targets:
        return plain
    return partial(adapted, rank=plan.config.lora.rank, scale=plan.lora.scale)


def is_adapter(name: str) -> bool:
    """Return whether a logical or local name is that of an adapter matrix."""
    return name.endswith(ADAPTER_NAMES)


def freeze_base(chunks: Iterable[torch.nn.Module]) -> None:
    """Leave adapters as the only parameters that are trained; call before gradients have buffers.

    The embeddings that enter a chunk require a gradient all the same: recomputation and pipeline
    messages look at their input to know whether there is anything to differentiate.
    """
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(is_adapter(name))
        embedding = dict(chunk.named_children()).get("embedding")
        if embedding is not None:
            embedding.register_forward_hook(_require_gradient)


def _require_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()
