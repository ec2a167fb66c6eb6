"""The hybrid Ring-linear 2.0 family, for transformers 4.56 to 5.x.

This file travels inside an exported folder. It adds lightning attention to its sibling
`modeling_bailing_moe_v2.py`; every `layer_group_size`-th layer stays softmax attention. Lightning
attention is plain torch, or the Triton kernel of flash-linear-attention where that is installed, a
GPU is there and the model is in bf16 or fp16.

Shape letters as there; c is the tokens of a chunk.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_bailing_moe_linear_v2 import BailingMoeLinearV2Config
from .modeling_bailing_moe_v2 import (
    BailingMoeV2Attention,
    BailingMoeV2ForCausalLM,
    BailingMoeV2Model,
    BailingMoeV2RMSNorm,
    Step,
    apply_rope,
    at_least_fp32,
)

CHUNK_TOKENS = 64


def head_slopes(num_heads: int) -> list[float]:
    """Return the ALiBi slopes 2^(-8(i+1)/n), i = 0..n-1; interleaved where n is no power of two."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    if power < num_heads:
        slopes += head_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def decay_slopes(config: BailingMoeLinearV2Config, layer_index: int) -> list[float]:
    """Return the positive decay rate of each head of one layer (0-based, over all trunk layers)."""
    rule = config.decay_layer_rule
    if rule not in ("zero_based", "shifted"):
        raise ValueError(
            f"config.json: decay_layer_rule={rule!r}; it must be 'zero_based' (layer l forgets "
            "with 1 - l/(L-1)) or 'shifted' (1 - (l-1)/(L-1)), as the checkpoint was trained: add "
            "it to config.json or pass decay_layer_rule=... to from_pretrained"
        )
    place = layer_index if rule == "zero_based" else layer_index - 1
    last = config.num_hidden_layers - 1
    factor = 1 - (place / last if last else 0) + 1e-5
    return [slope * factor for slope in head_slopes(config.num_attention_heads)]


def lightning_attention(
    qkv: tuple[Tensor, Tensor, Tensor], slopes: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return o_t = d^-1/2 q_t S_t, where S_t = exp(-slope) S_{t-1} + k_t^T v_t, and the last S.

    Chunk by chunk: inside a chunk by its masked score matrix, across chunks by the state.

    Args:
        qkv: three times [b, n, s, d], fp32.
        slopes: [n] positive, fp32.
        state: [b, n, d, d] before the first token, fp32.
    """
    outputs = []
    for q, k, v in zip(*(x.split(CHUNK_TOKENS, dim=2) for x in qkv), strict=True):
        num_tokens = q.shape[2]
        place = torch.arange(num_tokens, device=q.device, dtype=q.dtype)
        distance = place[:, None] - place  # [c, c]
        rate = slopes[:, None, None]
        decay = torch.exp(-rate * distance.clamp(min=0)) * (distance >= 0)  # [n, c, c]
        since_start = torch.exp(-rate * (place[:, None] + 1))  # [n, c, 1]
        until_end = torch.exp(-rate * (num_tokens - 1 - place[:, None]))  # [n, c, 1]
        out = (q @ k.mT * decay) @ v + since_start * (q @ state)
        outputs.append(out * q.shape[-1] ** -0.5)
        state = torch.exp(-rate * num_tokens) * state + (k * until_end).mT @ v
    return torch.cat(outputs, dim=2), state


@functools.cache
def fla_kernel() -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return `chunk_simple_gla` of flash-linear-attention, None where it is not installed.

    Call it with a GPU only: elsewhere the import takes a minute and nothing in it runs.
    """
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        return None
    return chunk_simple_gla


def lightning_kernel(x: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return the kernel for hidden states like x [b, s, h]; None: plain torch.

    fla multiplies fp32 in TF32, so a model in fp32 goes without; so does a step of one token.
    """
    if not x.is_cuda or x.dtype.itemsize > 2 or x.shape[1] == 1:
        return None
    return fla_kernel()


def lightning_attention_by(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    qkv: tuple[Tensor, Tensor, Tensor],
    slopes: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return what `lightning_attention` returns, by a kernel in the manner of fla.

    Source of its contract, [b, s, n, d] and the logarithm of the decay as `g_gamma`:
    fla-org/flash-linear-attention @ 07784bc, fla/ops/simple_gla/chunk.py.
    """
    q, k, v = (x.transpose(1, 2).contiguous() for x in qkv)
    out, state = kernel(
        q, k, v, g_gamma=-slopes, scale=None, initial_state=state, output_final_state=True
    )
    return out.transpose(1, 2), state


class BailingMoeLinearV2GroupRMSNorm(BailingMoeV2RMSNorm):
    """RMSNorm over groups of neighbouring channels, one weight per channel."""

    def __init__(self, size: int, num_groups: int, eps: float) -> None:
        """Make the weight [size]; `num_groups` divides it."""
        super().__init__(size, eps)
        self.num_groups = num_groups

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., size] normalised group by group, in its dtype."""
        groups = at_least_fp32(x).unflatten(-1, (self.num_groups, -1))
        groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * groups.flatten(-2).to(x.dtype)


class BailingMoeLinearV2LinearAttention(nn.Module):
    """Lightning attention: fixed decay per head, QK-norm, partial rope, grouped norm, output gate.

    Everything between the projections is in fp32.
    """

    def __init__(self, config: BailingMoeLinearV2Config, layer_index: int) -> None:
        """Make one layer; `layer_index` is its place in the trunk, which sets how it forgets."""
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        self.slopes = decay_slopes(config, layer_index)
        self.linear_silu = config.linear_silu
        eps, hidden_size = config.rms_norm_eps, config.hidden_size
        width = config.num_attention_heads * self.head_dim
        self.query_key_value = nn.Linear(hidden_size, 3 * width, bias=False)
        self.query_layernorm = BailingMoeV2RMSNorm(self.head_dim, eps)
        self.key_layernorm = BailingMoeV2RMSNorm(self.head_dim, eps)
        self.g_proj = nn.Linear(hidden_size, width, bias=False)
        self.g_norm = BailingMoeLinearV2GroupRMSNorm(width, config.group_norm_size, eps)
        self.dense = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Return the attention output for x [b, s, h], and advance the cached state."""
        qkv = at_least_fp32(self.query_key_value(x))
        if self.linear_silu:
            qkv = F.silu(qkv)
        heads = qkv.unflatten(-1, (3, -1, self.head_dim)).transpose(1, 3)  # [b, n, 3, s, d]
        q, k, v = heads.unbind(2)  # [b, n, s, d]
        q = apply_rope(self.query_layernorm(q), step)
        k = apply_rope(self.key_layernorm(k), step)
        if step.is_token is not None:
            v = v * step.is_token[:, None, -x.shape[1] :, None]
        key = (self.layer_index, "state")
        state = None if step.cache is None else step.cache.tensors.get(key)
        if state is None:
            state = v.new_zeros(*v.shape[:2], self.head_dim, self.head_dim)
        slopes = torch.tensor(self.slopes, dtype=v.dtype, device=v.device)
        kernel = lightning_kernel(x)
        if kernel is None:
            out, state = lightning_attention((q, k, v), slopes, state)
        else:
            out, state = lightning_attention_by(kernel, (q, k, v), slopes, state)
        if step.cache is not None:
            step.cache.tensors[key] = state
        out = self.g_norm(out.transpose(1, 2).flatten(2))
        out = out * at_least_fp32(self.g_proj(x)).sigmoid()
        return self.dense(out.to(x.dtype))


class BailingMoeLinearV2Model(BailingMoeV2Model):
    """Embedding, hybrid layers and final norm."""

    config_class = BailingMoeLinearV2Config

    def make_attention(self, layer_index: int) -> nn.Module:
        """Return softmax attention for the last layer of each group, lightning for the others."""
        if (layer_index + 1) % self.config.layer_group_size == 0:
            return BailingMoeV2Attention(self.config, layer_index)
        return BailingMoeLinearV2LinearAttention(self.config, layer_index)


class BailingMoeLinearV2ForCausalLM(BailingMoeV2ForCausalLM):
    """Ring-linear 2.0 with its language-model head."""

    config_class = BailingMoeLinearV2Config
    trunk_class = BailingMoeLinearV2Model
