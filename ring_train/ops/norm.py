"""Root-mean-square norms with statistics in fp32 (fp64 for fp64 inputs)."""

import torch
from jaxtyping import Float
from torch import Tensor

from ring_train.ops.precision import compute_dtype


def rms_norm(
    x: Float[Tensor, "*batch d"], weight: Float[Tensor, " d"], eps: float
) -> Float[Tensor, "*batch d"]:
    """Return `x` over its root mean square, cast back, then times `weight`, in the dtype of `x`.

    Source: inclusionAI/Ling-V2 @ af8837e `modeling_bailing_moe_v2.py`, BailingMoeV2RMSNorm: the
    cast comes before the weight, which matters below fp32.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight={tuple(weight.shape)} does not match the last dimension of x={tuple(x.shape)};"
            " give one weight per channel"
        )
    normed = _over_root_mean_square(x.to(compute_dtype(x.dtype)), eps)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def gated_group_norm(
    x: Float[Tensor, "*batch m"],
    gate: Float[Tensor, "*batch m"],
    weight: Float[Tensor, " m"],
    *,
    num_groups: int,
    eps: float,
) -> Float[Tensor, "*batch m"]:
    """Return groupnorm(x) * weight * sigmoid(gate), all in fp32, cast to the dtype of `x` last.

    Args:
        x: the output of the heads side by side; each of `num_groups` runs of neighbouring
            channels has its own mean square.
        gate: before the sigmoid; it is not normalised.
        weight: one per channel.
        num_groups: groups in the channels given, that is of this rank.
        eps: added to the mean square.
    """
    if gate.shape != x.shape or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"x={tuple(x.shape)}, gate={tuple(gate.shape)}, weight={tuple(weight.shape)} differ; "
            "give gate the shape of x and one weight per channel"
        )
    if num_groups < 1 or x.shape[-1] % num_groups:
        raise ValueError(
            f"num_groups={num_groups} does not divide {x.shape[-1]} channels; shard whole groups"
        )
    dtype = compute_dtype(x.dtype)
    grouped = x.to(dtype).unflatten(-1, (num_groups, -1))
    normed = _over_root_mean_square(grouped, eps).flatten(-2)
    return (normed * weight.to(dtype) * torch.sigmoid(gate.to(dtype))).to(x.dtype)


def _over_root_mean_square(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
