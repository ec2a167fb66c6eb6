"""Decay rates of lightning attention."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_OFFSETS = {"zero_based": 0, "shifted": 1}
_FLOOR = 1e-5


def decay_slopes(
    num_heads: int, layer_index: int, num_layers: int, rule: str, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " n"]:
    """Return the per-head decay rates of one lightning layer: all > 0, computed in float64.

    A state decays by exp(-rate) per token; deeper layers forget less. The table depends on the
    global layer index and on the heads of the whole layer, never on the parallel layout: shard it
    after it is built.

    Args:
        num_heads: heads of the whole layer, not of this rank.
        layer_index: 0-based, global, counting linear and softmax layers.
        num_layers: decoder layers, MTP layers excluded.
        rule: `zero_based` for the factor 1 - l / (L - 1) + 1e-5 (serving engines), `shifted` for
            1 - (l - 1) / (L - 1) + 1e-5 (Hugging Face remote code).
        dtype: of the result.

    Source: ALiBi (arXiv 2108.12409) slopes times the depth factor of SGLang
    `layers/attention/linear/lightning_backend.py` (zero_based) and of inclusionAI/Ring-V2.5
    `modeling_bailing_moe_v2_5.py` (shifted).
    """
    if rule not in _OFFSETS:
        raise ValueError(f"decay rule {rule!r} is unknown; choose one of {sorted(_OFFSETS)}")
    if num_heads < 1 or not 0 <= layer_index < max(num_layers, 1):
        raise ValueError(
            f"num_heads={num_heads}, layer_index={layer_index}, num_layers={num_layers} name no "
            "layer; heads start at 1 and 0 <= layer_index < num_layers"
        )
    depth = (layer_index - _OFFSETS[rule]) / (num_layers - 1) if num_layers > 1 else 0.0
    factor = 1.0 - depth + _FLOOR
    return (torch.tensor(_base_slopes(num_heads), dtype=torch.float64) * factor).to(dtype)


def _base_slopes(num_heads: int) -> list[float]:
    closest = 1 << (num_heads.bit_length() - 1)
    if closest == num_heads:
        return [2.0 ** (-8.0 * (head + 1) / num_heads) for head in range(num_heads)]
    return _base_slopes(closest) + _base_slopes(2 * closest)[0::2][: num_heads - closest]


def decay_weights(
    rates: Float[Tensor, " n"], distance: Int[Tensor, "..."], dtype: torch.dtype
) -> Float[Tensor, "n ..."]:
    """Return exp(-rate * distance), 0 for a distance < 0, rounded once from float64.

    Args:
        rates: decay rates > 0, float64.
        distance: in tokens.
        dtype: of the result.
    """
    rates = rates.view(-1, *(1 for _ in distance.shape))
    return (torch.exp(-rates * distance.clamp(min=0)) * (distance >= 0)).to(dtype)
