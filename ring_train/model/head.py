"""The output layer, normalised over the vocabulary in the first generation (norm_head)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear

NORM_EPS = 1e-7
"""Added to the norm of a channel (model-spec 2.5)."""


class OutputLayer(ColumnParallelLinear):
    """Logits of hidden states by a weight whose channels `norm_head` may normalise.

    Each channel is then divided by its L2 norm over the vocabulary, in which no gradient flows.
    W / n applied to x is W applied to x / n, so the hidden states are divided and the weight, which
    is as large as a layer, is never copied.

    Source: inclusionAI/Ring @ 3b256cc `modeling_bailing_moe.py`, BailingMoeForCausalLM.
    """

    def __init__(self, *args: Any, norm_head: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm_head = norm_head

    def forward(
        self, input_: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (logits [t, 1, v/tp], None) of hidden states [t/sp, 1, h]."""
        return super().forward(self.scaled(input_), *args, **kwargs)

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return hidden states [..., h] as the plain weight expects them. Collective over tp."""
        if not self.norm_head:
            return hidden
        return (hidden / (self.channel_norms() + NORM_EPS)).to(hidden.dtype)

    @torch.no_grad()
    def channel_norms(self) -> torch.Tensor:
        """Return the L2 norm [h] of each channel over the vocabulary, fp32 (fp64).

        Collective over tp.
        """
        weight: Any = self.weight  # None only where layers share one
        group: Any = self.tp_group
        dtype = torch.promote_types(weight.dtype, torch.float32)
        squares = torch.linalg.vector_norm(weight, dim=0, dtype=dtype).square()  # [h]
        if group.size() > 1:
            torch.distributed.all_reduce(squares, group=group)
        return squares.sqrt()
