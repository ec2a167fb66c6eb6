"""The output layer, normalised over the vocabulary in the first generation (norm_head)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import ColumnParallelLinear

from ring_train.model.cross_entropy import Chunks, chunked_cross_entropy

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

    def chunked_losses(
        self, hidden: torch.Tensor, labels: torch.Tensor, *, num_tokens: int, backend: str
    ) -> torch.Tensor:
        """Return -log p(label) [t] fp32 (fp64) without the logits of all tokens.

        Collective over tp. All rows of a step go this way or none: gradients of the weight that
        come by autograd are not added to its `main_grad` after those that went there at once.

        Args:
            hidden: [t/sp, 1, h].
            labels: [t] int64.
            num_tokens: tokens whose logits exist at a time.
            backend: of `ring_train.ops.cross_entropy`.
        """
        group: Any = self.tp_group
        weight: Any = self.weight  # None only where layers share one
        hidden = self.scaled(hidden).flatten(0, 1)  # [t/sp, h]
        if self.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=group)
        return chunked_cross_entropy(hidden, weight, labels, Chunks(group, num_tokens, backend))

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
