"""Rotary position embedding on the first channels of each head, rotate-half layout."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ring_train.ops.precision import compute_dtype


def rotary_angles(
    position_ids: Int[Tensor, " t"],
    rotary_dim: int,
    base: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Float[Tensor, "t r"], Float[Tensor, "t r"]]:
    """Return cos and sin of position * base ** (-2 j / r), pairs (j, j + r/2) alike, in `dtype`.

    Frequencies and angles are rounded in `dtype` step by step as Hugging Face does in float32.
    """
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"rotary_dim={rotary_dim} does not pair channels; choose an even number")
    if position_ids.dim() != 1 or position_ids.is_floating_point():
        raise ValueError(
            f"position_ids {tuple(position_ids.shape)} {position_ids.dtype} are not one int64 per "
            "token; pass [t] integers"
        )
    compute_dtype(dtype)
    exponents = torch.arange(0, rotary_dim, 2, device=position_ids.device).to(dtype) / rotary_dim
    angles = position_ids.to(dtype)[:, None] * (1.0 / base**exponents)  # [t, r/2]
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_partial_rope(
    x: Float[Tensor, "t n d"], cos: Float[Tensor, "t r"], sin: Float[Tensor, "t r"]
) -> Float[Tensor, "t n d"]:
    """Return `x` with its first r channels rotated (j with j + r/2), the others unchanged.

    cos and sin are cast to the dtype of `x` first, as Hugging Face does.
    """
    rotary_dim = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape[0] != x.shape[0] or rotary_dim > x.shape[-1]:
        raise ValueError(
            f"cos={tuple(cos.shape)}, sin={tuple(sin.shape)} do not fit x={tuple(x.shape)}; take "
            "them from rotary_angles of the same tokens, with rotary_dim <= d"
        )
    compute_dtype(x.dtype)
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)  # [t, 1, r]
    rotated, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    low, high = rotated.chunk(2, dim=-1)
    turned = rotated * cos + torch.cat([-high, low], dim=-1) * sin
    return torch.cat([turned, passed], dim=-1)
