"""SwiGLU of stacked gate and up projections, times a weight for each row, as experts need it."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ring_train.ops.backends import resolve_backend


def weighted_swiglu(
    x: Float[Tensor, "m two_f"], weights: Float[Tensor, " m_too"], *, backend: str = "auto"
) -> Float[Tensor, "m f"]:
    """Return silu(gate) * up * weight in the dtype of `x`; differentiable in both arguments.

    Every row is for itself: what is undefined in one stays in it.

    Args:
        x: gate in the first half of the channels, up in the second.
        weights: of each row, fp32 (or fp64).
        backend: "auto", "torch" or "triton", which computes in fp32 and keeps no intermediate.

    Raises:
        ValueError: shapes do not fit together.
    """
    if x.shape[1] % 2 or weights.shape[0] != x.shape[0]:
        raise ValueError(
            f"x {tuple(x.shape)} and weights {tuple(weights.shape)} do not fit; give an even "
            "number of channels and a weight per row"
        )
    if resolve_backend(backend, x) == "triton":
        return _WeightedSwiglu.apply(x, weights)
    return weighted_swiglu_reference(x, weights)


def weighted_swiglu_reference(
    x: Float[Tensor, "m two_f"], weights: Float[Tensor, " m"]
) -> Float[Tensor, "m f"]:
    """Return `weighted_swiglu` in torch.

    Rounds where megatron-core 0.19.2 does (`transformer/mlp.py`, MLP.forward).
    """
    gate, up = x.chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate) * up
    return (inner * weights.unsqueeze(-1)).to(x.dtype)


class _WeightedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor) -> Tensor:
        from ring_train.ops.kernels.swiglu import swiglu

        x, weights = x.contiguous(), weights.contiguous()
        ctx.save_for_backward(x, weights)
        return swiglu(x, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        from ring_train.ops.kernels.swiglu import swiglu_gradient

        return swiglu_gradient(grads[0].contiguous(), *ctx.saved_tensors)
