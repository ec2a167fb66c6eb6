"""Root-mean-square norms with statistics in fp32 (fp64 for fp64 inputs)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ring_train.ops.backends import resolve_backend
from ring_train.ops.precision import compute_dtype

MAX_GROUP_CHANNELS = 16384
"""Of the Triton kernels, which hold a group of a row in registers."""


def rms_norm(
    x: Float[Tensor, "*batch d"], weight: Float[Tensor, " d"], eps: float, *, backend: str = "auto"
) -> Float[Tensor, "*batch d"]:
    """Return `x` over its root mean square, cast back, then times `weight`, in the dtype of `x`.

    "triton" reads and writes every element once, 2 d elements of a row; backward 3 d, and only `x`
    is kept. "torch" keeps copies in fp32 as autograd needs them.

    Args:
        x: rows to normalise.
        weight: one per channel.
        eps: added to the mean square.
        backend: "torch", "triton" (d up to 16384) or "auto"; both round alike.

    Source: inclusionAI/Ling-V2 @ af8837e `modeling_bailing_moe_v2.py`, BailingMoeV2RMSNorm: the
    cast comes before the weight, which matters below fp32.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight={tuple(weight.shape)} does not match the last dimension of x={tuple(x.shape)};"
            " give one weight per channel"
        )
    if resolve_backend(backend, x) == "triton":
        return _triton_norm(x, None, weight, num_groups=1, eps=eps)
    normed = _over_root_mean_square(x.to(compute_dtype(x.dtype)), eps)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def gated_group_norm(
    x: Float[Tensor, "*batch m"],
    gate: Float[Tensor, "*batch m"],
    weight: Float[Tensor, " m"],
    *,
    num_groups: int,
    eps: float,
    backend: str = "auto",
) -> Float[Tensor, "*batch m"]:
    """Return groupnorm(x) * weight * sigmoid(gate), all in fp32, cast to the dtype of `x` last.

    "triton" reads and writes every element once, 3 m elements of a token; backward 5 m, and only
    `x` and `gate` are kept. "torch" keeps four copies in fp32.

    Args:
        x: the output of the heads side by side; each of `num_groups` runs of neighbouring
            channels has its own mean square.
        gate: before the sigmoid; it is not normalised.
        weight: one per channel.
        num_groups: groups in the channels given, that is of this rank.
        eps: added to the mean square.
        backend: "torch", "triton" (groups of up to 16384 channels) or "auto".
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
    if resolve_backend(backend, x) == "triton":
        return _triton_norm(x, gate, weight, num_groups=num_groups, eps=eps)
    dtype = compute_dtype(x.dtype)
    grouped = x.to(dtype).unflatten(-1, (num_groups, -1))
    normed = _over_root_mean_square(grouped, eps).flatten(-2)
    return (normed * weight.to(dtype) * torch.sigmoid(gate.to(dtype))).to(x.dtype)


def _over_root_mean_square(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _triton_norm(
    x: Tensor, gate: Tensor | None, weight: Tensor, *, num_groups: int, eps: float
) -> Tensor:
    if x.shape[-1] // num_groups > MAX_GROUP_CHANNELS:
        raise ValueError(
            f"x={tuple(x.shape)} has {x.shape[-1] // num_groups} channels in a group; "
            f"backend='triton' takes up to {MAX_GROUP_CHANNELS}, choose backend='torch'"
        )
    if gate is not None and gate.dtype != x.dtype:
        raise ValueError(
            f"gate is {gate.dtype}, x is {x.dtype}; backend='triton' takes one dtype, cast the gate"
        )
    tensors = [y for y in (gate, weight) if y is not None]
    if any(y.device != x.device for y in tensors):
        raise ValueError(
            f"x is on {x.device}, gate and weight on {[str(y.device) for y in tensors]}; move them "
            "to one device"
        )
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    gates = None if gate is None else gate.reshape(-1, x.shape[-1]).contiguous()
    options = {"num_groups": num_groups, "eps": eps}
    return _Norm.apply(rows, gates, weight.contiguous(), options).view(x.shape)


class _Norm(torch.autograd.Function):
    """The Triton kernels; statistics are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, options: dict[str, Any]
    ) -> Tensor:
        from ring_train.ops.kernels.norm import normalise

        ctx.save_for_backward(x, gate, weight)
        ctx.options = options
        return normalise(x, gate, weight, **options)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override] -- once_differentiable hides the name of ctx
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from ring_train.ops.kernels.norm import normalise_gradients

        x, gate, weight = ctx.saved_tensors
        x_grad, gate_grad, weight_grad = normalise_gradients(
            x, gate, weight, grad.contiguous(), **ctx.options
        )
        return x_grad, gate_grad, weight_grad.to(weight.dtype), None
