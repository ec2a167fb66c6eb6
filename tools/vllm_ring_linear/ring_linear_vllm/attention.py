"""Lightning attention on vLLM's own layer: parameters, loader, state cache and GPU kernels are its.

Unusual: new sequences get a clean state in the metadata builder. vLLM's layer does so for prefills
only, and a first chunk of one token is counted as a decode step there: such a sequence would go on
from the state of whoever had its slot before.

Shape letters: t tokens of the step, n heads of this rank, d head size, r sequences, c chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNormGated
from vllm.model_executor.layers.mamba.linear.bailing_linear_attn import BailingMoELinearAttention
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import (
    BailingLinearAttentionBackend,
    BailingLinearAttentionMetadata,
    BailingLinearAttentionMetadataBuilder,
)

from ring_linear_vllm.config import decay_slopes

CHUNK_TOKENS = 64


class RingLinearMetadataBuilder(BailingLinearAttentionMetadataBuilder):
    """vLLM's builder, which also zeroes the state of every sequence that starts in this step."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        """Remember the layers whose state this builder describes."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.state_layers = [
            self.compilation_config.static_forward_context[name] for name in layer_names
        ]

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, **kwargs: Any
    ) -> BailingLinearAttentionMetadata:
        """Return the metadata of a step, with clean states for its new sequences."""
        starts = common_attn_metadata.query_start_loc_cpu
        seq_lens = common_attn_metadata.seq_lens_cpu_upper_bound
        assert seq_lens is not None
        query_lens = starts[1:] - starts[:-1]  # [r]
        is_new = (query_lens > 0) & (seq_lens[: len(query_lens)] == query_lens)
        if is_new.any():
            blocks = common_attn_metadata.block_table_tensor
            slots = blocks[is_new.nonzero().flatten().to(blocks.device), 0].long()
            for layer in self.state_layers:
                layer.clear_states(slots)
        return super().build(common_prefix_len, common_attn_metadata, **kwargs)


class RingLinearBackend(BailingLinearAttentionBackend):
    """vLLM's backend with the builder of this file."""

    @staticmethod
    def get_builder_cls() -> type[RingLinearMetadataBuilder]:
        """Return the class that makes the metadata of each step."""
        return RingLinearMetadataBuilder


class RingLinearAttention(BailingMoELinearAttention):
    """Lightning attention with the decay rule of the folder, fp32 state and fp32 rope.

    Heads are divided over tensor-parallel ranks; slopes are cut after the whole table is built.
    """

    def __init__(self, config: PretrainedConfig, vllm_config: VllmConfig, prefix: str) -> None:
        """Build vLLM's layer, then replace its decay and its table of rotations."""
        super().__init__(config, vllm_config, prefix)
        slopes = torch.tensor(decay_slopes(config, self.layer_idx), dtype=torch.float32)
        self.slope_rate = slopes[:, None, None]
        mine = slice(self.tp_rank * self.tp_heads, (self.tp_rank + 1) * self.tp_heads)
        self.tp_slope = self.slope_rate[mine].contiguous()  # [n, 1, 1]
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=config.max_position_embeddings,
            is_neox_style=True,
            rope_parameters=config.rope_parameters,
            dtype=torch.float32,
        )

    def get_state_dtype(self) -> tuple[torch.dtype]:
        """Return fp32, whatever the model computes in."""
        return (torch.float32,)

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Return the backend of this file."""
        return RingLinearBackend

    def clear_states(self, slots: Tensor) -> None:
        """Zero the states in these slots of the cache, if it is allocated yet."""
        if len(self.kv_cache) and self.kv_cache[0].numel():
            self.kv_cache[0][slots] = 0

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        """Return the attention output for hidden_states [t, h]; padded tokens give 0."""
        output = torch.zeros_like(hidden_states)
        super().forward(hidden_states, output, position_ids)
        return output

    def _forward(self, hidden_states: Tensor, output: Tensor, positions: Tensor) -> None:
        """Write the attention output; vLLM's custom op calls this outside of any graph."""
        if not current_platform.is_cpu():
            super()._forward(hidden_states, output, positions)
            return
        metadata = (get_forward_context().attn_metadata or {}).get(self.prefix)
        if metadata is None:  # vLLM measures memory
            return
        num_tokens = metadata.num_decode_tokens + metadata.num_prefill_tokens
        x = hidden_states[:num_tokens]
        q, k, v = self._queries_keys_values(x, positions[:num_tokens])
        mixed = self._recurrence(q * self.scaling, k, v, metadata)
        gate, _ = self.g_proj(x)
        mixed = RMSNormGated.forward_static(
            mixed.flatten(1),
            gate,
            self.g_norm.weight,
            self.rms_norm_eps,
            orig_dtype=x.dtype,
            group_size=self.g_norm.group_size,
            norm_before_gate=True,
            activation="sigmoid",
        )
        output[:num_tokens], _ = self.dense(mixed)

    def _queries_keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised and rotated q, k, and v, each [t, n, d] in fp32."""
        qkv = self.query_key_value(x)[0].float()
        if self.linear_silu:
            qkv = F.silu(qkv)
        q, k, v = qkv.unflatten(-1, (3, self.tp_heads, self.head_dim)).unbind(1)
        q, k = (
            RMSNormGated.forward_static(y, None, norm.weight, self.rms_norm_eps, torch.float32)
            for y, norm in ((q, self.query_layernorm), (k, self.key_layernorm))
        )
        q, k = self.rotary_emb(positions, q.flatten(1), k.flatten(1))
        return q.view_as(v), k.view_as(v), v

    def _recurrence(
        self, q: Tensor, k: Tensor, v: Tensor, metadata: BailingLinearAttentionMetadata
    ) -> Tensor:
        """Return the outputs [t, n, d] of all sequences, and advance their cached states."""
        cache = self.kv_cache[0]  # [slots, n, d, d] fp32
        num_decodes = metadata.num_decodes
        slots = metadata.state_indices_tensor.tolist()
        starts = metadata.query_start_loc.tolist()
        outputs = []
        if num_decodes:
            mine = slots[:num_decodes]
            tokens = (y[:num_decodes].unsqueeze(2) for y in (q, k, v))  # each [r, n, 1, d]
            out, cache[mine] = lightning_attention(*tokens, self.tp_slope, cache[mine])
            outputs.append(out.squeeze(2))
        for i in range(num_decodes, num_decodes + metadata.num_prefills):
            tokens = (y[starts[i] : starts[i + 1]].transpose(0, 1) for y in (q, k, v))  # [n, t, d]
            out, cache[slots[i]] = lightning_attention(*tokens, self.tp_slope, cache[slots[i]])
            outputs.append(out.transpose(0, 1))
        return torch.cat(outputs)


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Return o_t = q_t S_t, where S_t = exp(-slope) S_{t-1} + k_t^T v_t, and the last S.

    Chunk by chunk: inside a chunk by its masked score matrix, across chunks by the state.

    Args:
        q: [..., n, t, d] fp32, scaled already.
        k: as q.
        v: as q.
        slopes: [n, 1, 1] positive, fp32.
        state: [..., n, d, d] before the first token, fp32; not written to.
    """
    outputs = []
    for q_c, k_c, v_c in zip(*(x.split(CHUNK_TOKENS, dim=-2) for x in (q, k, v)), strict=True):
        place = torch.arange(q_c.shape[-2], device=q.device, dtype=q.dtype)
        distance = place[:, None] - place  # [c, c]
        decay = torch.exp(-slopes * distance.clamp(min=0)) * (distance >= 0)  # [n, c, c]
        since_start = torch.exp(-slopes * (place[:, None] + 1))  # [n, c, 1]
        until_end = torch.exp(-slopes * (len(place) - 1 - place[:, None]))  # [n, c, 1]
        outputs.append((q_c @ k_c.mT * decay) @ v_c + since_start * (q_c @ state))
        state = torch.exp(-slopes * len(place)) * state + (k_c * until_end).mT @ v_c
    return torch.cat(outputs, dim=-2), state
