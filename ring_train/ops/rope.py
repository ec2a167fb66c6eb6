"""Rotary position embedding on the first channels of each head, rotate-half layout."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ring_train.ops.precision import compute_dtype

YARN_FAST_TURNS, YARN_SLOW_TURNS = 32.0, 1.0
"""Channels that turn more often than the first over the original context keep their frequency;
those that turn less often than the second are slowed by the full factor."""


def rotary_angles(
    position_ids: Int[Tensor, " t"],
    rotary_dim: int,
    base: float,
    dtype: torch.dtype = torch.float32,
    yarn: tuple[float, int] | None = None,
) -> tuple[Float[Tensor, "t r"], Float[Tensor, "t r"]]:
    """Return cos and sin of position * base ** (-2 j / r), pairs (j, j + r/2) alike, in `dtype`.

    Frequencies and angles are rounded in `dtype` step by step as Hugging Face does in float32.

    Args:
        position_ids: 0 at the start of every document.
        rotary_dim: r, channels that rotate.
        base: theta.
        dtype: of the arithmetic and the result.
        yarn: (factor, original context in tokens) of YaRN; cos and sin then also carry its
            attention factor, 0.1 ln(factor) + 1.

    Source: B. Peng et al., YaRN, arXiv 2309.00071, sections 3.2 to 3.4.
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
    periods = base**exponents  # [r/2], over 2 pi
    frequencies = 1.0 / periods if yarn is None else _yarn_frequencies(periods, base, *yarn)
    angles = position_ids.to(dtype)[:, None] * frequencies  # [t, r/2]
    angles = torch.cat([angles, angles], dim=-1)
    if yarn is None:
        return angles.cos(), angles.sin()
    attention_factor = 0.1 * math.log(yarn[0]) + 1.0
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def _yarn_frequencies(
    periods: Float[Tensor, " c"], base: float, factor: float, original_tokens: int
) -> Float[Tensor, " c"]:
    """Return the frequencies of YaRN: those of quick channels kept, of slow ones over `factor`."""
    pairs = len(periods)

    def channel_of(turns: float) -> float:
        """Return the (fractional) channel that turns so often over the original context."""
        return pairs * math.log(original_tokens / (turns * 2 * math.pi)) / math.log(base)

    low = max(math.floor(channel_of(YARN_FAST_TURNS)), 0)
    high = min(math.ceil(channel_of(YARN_SLOW_TURNS)), 2 * pairs - 1)
    width = high - low if high > low else 0.001
    channels = torch.arange(pairs, device=periods.device).to(periods.dtype)
    slowed = ((channels - low) / width).clamp(0, 1)
    return (1.0 / (factor * periods)) * slowed + (1.0 / periods) * (1 - slowed)


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
