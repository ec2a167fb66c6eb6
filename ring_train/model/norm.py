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

    Args:
        config: megatron's config (dtype and tag of the weight).
        hidden_size: channels.
        eps: added to the mean square.
        backend: of `rms_norm`.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, backend: str = "torch"
    ) -> None:
        super().__init__()
        self.eps = eps
        self.backend = backend
        weight: Any = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        weight.sequence_parallel = config.sequence_parallel  # read by megatron
        self.weight: torch.nn.Parameter = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalised x: same shape [..., h] and dtype."""
        return rms_norm(x, self.weight, self.eps, backend=self.backend)


class HeadNorm(RMSNorm):
    """The weight of a QK-norm, which `split_qk_norm_rope` applies with all else it does."""

    def forward(self) -> torch.Tensor:  # pyrefly: ignore[bad-override]
        """Return the weight [d]; a call, so that hooks which gather weights run before its use."""
        return self.weight


class GatedGroupNorm(torch.nn.Module):
    """Grouped RMSNorm of the attention output times sigmoid(gate), sharded by channel over TP.

    Args:
        config: megatron's config (dtype of the weight).
        channels: channels on this rank, n*d/tp.
        num_groups: norm groups on this rank, group_norm_size/tp.
        backend: of `gated_group_norm`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        channels: int,
        num_groups: int,
        backend: str,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.eps = config.layernorm_epsilon
        self.num_groups = num_groups
        weight: Any = torch.nn.Parameter(torch.ones(channels, dtype=config.params_dtype))
        weight.tensor_model_parallel = True  # counted on every TP rank in the gradient norm
        weight.partition_dim = 0  # read by tensors.py
        weight.partition_stride = 1  # read by megatron
        self.weight: torch.nn.Parameter = weight

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Return groupnorm(x) * sigmoid(gate); x and gate are [t, n*d/tp]."""
        return gated_group_norm(
            x, gate, self.weight, num_groups=self.num_groups, eps=self.eps, backend=self.backend
        )
