"""Lightning attention by flash-linear-attention: the one import of that library."""

import importlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ring_train.ops.lightning_inputs import LightningInputs


def fla_attention(
    inputs: LightningInputs,
) -> tuple[Float[Tensor, "t n dv"], Float[Tensor, "documents n d dv"] | None]:
    """Return what `lightning_attention` does.

    Source: fla-org/flash-linear-attention 0.6.0, `fla/ops/simple_gla/chunk.py`, where `g_gamma` is
    a constant log decay per head. Its `g` must not be used: it also gets a gradient.
    """
    q, k, v, slopes, cu_seqlens, lengths, scale, _, _, output_final_state = inputs
    initial_state = inputs.initial_states
    assert lengths is not None
    simple_gla: Any = importlib.import_module("fla.ops.simple_gla")
    many = len(lengths) > 1
    output, final_state = simple_gla.chunk_simple_gla(
        q[None],
        k[None],
        v[None],
        g_gamma=-slopes.detach().float(),
        scale=scale,
        initial_state=None if initial_state is None else initial_state.float(),
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens.to(q.device, torch.int64) if many else None,
    )
    return output[0], final_state
