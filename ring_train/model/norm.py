"""Norm modules in the order of operations of the released models (statistics in fp32)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from ring_train.ops.norm import gated_group_norm, rms_norm


class RMSNorm(torch.nn.Module):
    """RMSNorm that allows sequence parallelism: its weight is tagged for the gradient all-reduce.

    megatron's `WrappedTorchNorm` refuses sequence parallelism, and torch's RMSNorm multiplies by
    the weight before it casts back.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        weight.sequence_parallel = config.sequence_parallel  # read by megatron
        self.weight: torch.nn.Parameter = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised x: same shape [..., h] and dtype."""
        return rms_norm(x, self.weight, self.eps)


class GatedGroupNorm(torch.nn.Module):
    """Grouped RMSNorm of the attention output times sigmoid(gate), sharded by channel over TP.

    Args:
        config: megatron's config (dtype of the weight).
        channels: channels on this rank, n*d/tp.
        num_groups: norm groups on this rank, group_norm_size/tp.
    """

    def __init__(
        self,
        config: TransformerConfig,
        channels: int,
        num_groups: int,
    ) -> None:
        super().__init__()
        self.eps = config.layernorm_epsilon
        self.num_groups = num_groups
        weight: Any = torch.nn.Parameter(torch.ones(channels, dtype=config.params_dtype))
        weight.tensor_model_parallel = True  # counted on every TP rank in the gradient norm
        weight.partition_dim = 0  # read by tensors.py
        weight.partition_stride = 1  # read by megatron
        self.weight: torch.nn.Parameter = weight

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Return groupnorm(x) * sigmoid(gate); x and gate are [t, n*d/tp]."""
        return gated_group_norm(x, gate, self.weight, num_groups=self.num_groups, eps=self.eps)
