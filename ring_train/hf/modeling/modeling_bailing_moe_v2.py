"""The softmax Ling 2.0 family in plain torch, for transformers 4.56 to 5.x.

This file travels inside an exported folder and is loaded with `trust_remote_code=True`: it imports
torch, transformers and its siblings only. Unusual:

- statistics, rope tables, router and logits are in fp32, or in fp64 for a model in double;
- nothing is a non-persistent buffer: rope tables are computed in each forward;
- layers from `num_hidden_layers` on are MTP layers; `forward` ignores them, `mtp_logits` runs them;
- decoding uses our own cache, because the hybrid family keeps a state instead of keys and values.

Shape letters: b batch, s new tokens, p cached tokens, n heads, g key-value heads, d head dim,
h hidden, e experts, k experts per token, t = b * s, v vocabulary.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_bailing_moe_v2 import BailingMoeV2Config


def at_least_fp32(x: Tensor) -> Tensor:
    """Return x in fp32, or unchanged if it is in double."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class BailingMoeV2Cache:
    """What decoding remembers: keys and values of softmax layers, fp32 states of linear layers.

    `num_tokens` counts the positions seen, padding included; the model advances it once a forward.
    """

    is_compileable = False

    def __init__(self) -> None:
        """Start empty; layers are added by their first use."""
        self.num_tokens = 0
        self.tensors: dict[tuple[int, str], Tensor] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions seen (a name that `generate` asks for)."""
        return self.num_tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row i hold what row beam_idx[i] held (a name that beam search asks for)."""
        for key, value in self.tensors.items():
            self.tensors[key] = value.index_select(0, beam_idx.to(value.device))

    def append(self, layer_index: int, name: str, new: Tensor) -> Tensor:
        """Return all positions of one layer's keys or values [b, g, p + s, d], `new` included."""
        old = self.tensors.get((layer_index, name))
        self.tensors[layer_index, name] = new if old is None else torch.cat([old, new], dim=2)
        return self.tensors[layer_index, name]


class Step(NamedTuple):
    """What every layer of one forward shares."""

    cos: Tensor
    """[b, 1, s, rotary dims], fp32."""
    sin: Tensor
    """[b, 1, s, rotary dims], fp32."""
    is_token: Tensor | None
    """[b, p + s] bool, False at padding; None if there is none."""
    mask: Tensor | None
    """[b or 1, 1, s, p + s] bool, True where a query sees a key; None: every key up to itself."""
    cache: BailingMoeV2Cache | None


def rope_frequencies(config: BailingMoeV2Config, periods: Tensor) -> tuple[Tensor, float]:
    """Return frequencies [rotary / 2] and the factor of cos and sin; YaRN with its usual betas.

    YaRN (arXiv 2309.00071): channels that turn more than 32 times over the original context keep
    their frequency, those that turn less than once are slowed by the full factor.
    """
    scaling = config.yarn
    if scaling is None:
        return 1.0 / periods, 1.0
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    pairs, base = len(periods), config.rope_theta
    low, high = (
        pairs * math.log(context / (turns * 2 * math.pi)) / math.log(base) for turns in (32, 1)
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * pairs - 1)
    width = high - low if high > low else 0.001
    channels = torch.arange(pairs, device=periods.device).to(periods.dtype)
    slowed = ((channels - low) / width).clamp(0, 1)
    frequencies = (1.0 / (factor * periods)) * slowed + (1.0 / periods) * (1 - slowed)
    return frequencies, 0.1 * math.log(factor) + 1.0


def apply_rope(x: Tensor, step: Step) -> Tensor:
    """Rotate the first channels of x [b, n, s, d], pairs (i, i + rotary / 2); the others pass."""
    rotary = step.cos.shape[-1]
    turned, passed = x[..., :rotary], x[..., rotary:]
    first, second = turned.chunk(2, dim=-1)
    cos, sin = step.cos.to(x.dtype), step.sin.to(x.dtype)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, passed], dim=-1)


class BailingMoeV2RMSNorm(nn.Module):
    """weight * cast(x / rms(x)): statistics in fp32, cast back, then the weight."""

    def __init__(self, size: int, eps: float) -> None:
        """Make the weight [size]."""
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised over its last dimension, in its dtype."""
        wide = at_least_fp32(x)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class BailingMoeV2MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        """Make the three projections."""
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, ffn_size, bias=False)
        self.down_proj = nn.Linear(ffn_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the transform of x [..., h]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class BailingMoeV2Gate(nn.Linear):
    """Group-limited sigmoid router; `expert_bias` decides who is chosen, never with what weight."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        """Make the weight [e, h] and the bias [e]."""
        super().__init__(config.hidden_size, config.num_experts, bias=False)
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))
        self.top_k = config.num_experts_per_tok
        self.num_groups = config.n_group
        self.num_kept_groups = config.topk_group
        self.scale = config.routed_scaling_factor

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Keep the bias as it is when the model is cast: rounded it would choose other experts."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of each token [t, k] and their weights [t, k] fp32."""
        scores = F.linear(at_least_fp32(x), at_least_fp32(self.weight)).sigmoid()  # [t, e] fp32
        ranks = scores + self.expert_bias
        if self.num_kept_groups < self.num_groups:
            groups = ranks.unflatten(-1, (self.num_groups, -1))
            kept = groups.topk(2, dim=-1).values.sum(-1).topk(self.num_kept_groups, dim=-1).indices
            is_kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, kept, True)
            ranks = groups.masked_fill(~is_kept.unsqueeze(-1), -torch.inf).flatten(-2)
        experts = ranks.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return experts, weights * self.scale


class BailingMoeV2SparseMoeBlock(nn.Module):
    """Routed experts plus one shared expert; no token is dropped."""

    def __init__(self, config: BailingMoeV2Config, gate: nn.Module, shared_size: int) -> None:
        """Make the experts and a shared one of the given width beside a router."""
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(
            BailingMoeV2MLP(config.hidden_size, config.moe_intermediate_size)
            for _ in range(config.num_experts)
        )
        self.shared_experts = BailingMoeV2MLP(config.hidden_size, shared_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum over experts for x [b, s, h], combined in fp32."""
        tokens = x.flatten(0, 1)  # [t, h]
        experts, weights = self.gate(tokens)
        routed = torch.zeros_like(tokens, dtype=weights.dtype)  # [t, h] fp32
        for expert in experts.unique().tolist():
            token, slot = torch.where(experts == expert)
            out = self.experts[expert](tokens[token]).to(weights.dtype)
            routed = routed.index_add(0, token, out * weights[token, slot].unsqueeze(-1))
        return routed.to(x.dtype).view_as(x) + self.shared_experts(x)


def sparse_mlp(config: BailingMoeV2Config) -> BailingMoeV2SparseMoeBlock:
    """Return the mixture of experts of one layer."""
    shared_size = config.num_shared_experts * config.moe_shared_expert_intermediate_size
    return BailingMoeV2SparseMoeBlock(config, BailingMoeV2Gate(config), shared_size)


class BailingMoeV2Attention(nn.Module):
    """Causal softmax attention with grouped queries, QK-norm before a partial rope."""

    def __init__(self, config: BailingMoeV2Config, layer_index: int) -> None:
        """Make one layer's projections and norms; `layer_index` is its place in the cache."""
        super().__init__()
        self.layer_index = layer_index
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        width = self.num_heads * self.head_dim
        qkv_width = width + 2 * self.num_kv_heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, qkv_width, bias=False)
        self.query_layernorm = BailingMoeV2RMSNorm(self.head_dim, config.rms_norm_eps)
        self.key_layernorm = BailingMoeV2RMSNorm(self.head_dim, config.rms_norm_eps)
        self.dense = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Return the attention output for x [b, s, h]."""
        heads = self.query_key_value(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q = apply_rope(self.query_layernorm(q), step)  # [b, n, s, d]
        k = apply_rope(self.key_layernorm(k), step)  # [b, g, s, d]
        if step.cache is not None:
            k = step.cache.append(self.layer_index, "key", k)
            v = step.cache.append(self.layer_index, "value", v)
        queries_per_kv = self.num_heads // self.num_kv_heads
        k, v = (z.repeat_interleave(queries_per_kv, dim=1) for z in (k, v))
        is_causal = step.mask is None and x.shape[1] > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=step.mask, is_causal=is_causal)
        return self.dense(out.transpose(1, 2).flatten(2))


class BailingMoeV2DecoderLayer(nn.Module):
    """Pre-norm block: attention, then a dense or sparse MLP."""

    def __init__(self, config: BailingMoeV2Config, attention: nn.Module, mlp: nn.Module) -> None:
        """Make the norms around a given attention and MLP."""
        super().__init__()
        self.input_layernorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = attention
        self.post_attention_layernorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Return the residual stream [b, s, h] after this layer."""
        x = x + self.attention(self.input_layernorm(x), step)
        return x + self.mlp(self.post_attention_layernorm(x))


class BailingMoeV2MTPLayer(BailingMoeV2DecoderLayer):
    """One depth of multi-token prediction: a decoder layer over (next embedding, hidden state)."""

    def __init__(self, config: BailingMoeV2Config, layer_index: int) -> None:
        """Make a softmax + MoE layer with its input projection and norms."""
        attention = BailingMoeV2Attention(config, layer_index)
        super().__init__(config, attention, sparse_mlp(config))
        self.enorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.final_layernorm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def predict(self, embedding: Tensor, hidden: Tensor, step: Step) -> Tensor:
        """Return the normed hidden state [b, s, h] that predicts one token further."""
        joint = torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1)
        return self.final_layernorm(self(self.eh_proj(joint), step))


class BailingMoeV2PreTrainedModel(PreTrainedModel):
    """What transformers must know of the family."""

    config_class = BailingMoeV2Config
    base_model_prefix = "model"
    _no_split_modules = ("BailingMoeV2DecoderLayer", "BailingMoeV2MTPLayer")
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    # A state cannot be rolled back, so assisted decoding is refused.
    _is_stateful = True


class BailingMoeV2Model(BailingMoeV2PreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: BailingMoeV2Config) -> None:
        """Make the trunk layers, then the MTP layers."""
        super().__init__(config)
        num_layers = config.num_hidden_layers
        layers: list[BailingMoeV2DecoderLayer] = [
            BailingMoeV2DecoderLayer(config, self.make_attention(index), self.make_mlp(index))
            for index in range(num_layers)
        ]
        for depth in range(config.num_nextn_predict_layers):
            layers.append(BailingMoeV2MTPLayer(config, num_layers + depth))
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = BailingMoeV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def make_attention(self, layer_index: int) -> nn.Module:
        """Return the token mixer of one trunk layer."""
        return BailingMoeV2Attention(self.config, layer_index)

    def make_mlp(self, layer_index: int) -> nn.Module:
        """Return the channel mixer of one trunk layer."""
        config = self.config
        if layer_index < config.first_k_dense_replace:
            return BailingMoeV2MLP(config.hidden_size, config.intermediate_size)
        return sparse_mlp(config)

    @property
    def rotary_size(self) -> int:
        """Channels of a head that rotate."""
        return int(self.config.head_dim * self.config.partial_rotary_factor)

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding (a name that transformers asks for)."""
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding (a name that transformers asks for)."""
        self.word_embeddings = value

    def make_step(
        self,
        embeddings: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: BailingMoeV2Cache | None,
    ) -> Step:
        """Return what the layers share for embeddings [b, s, h] that follow what the cache holds.

        Args:
            embeddings: of the new tokens.
            attention_mask: [b, p + s], 0 at padding; positions then count real tokens.
            position_ids: [b, s], if they are not to be counted.
            cache: what came before.
        """
        num_new, device = embeddings.shape[1], embeddings.device
        num_past = 0 if cache is None else cache.num_tokens
        num_all = num_past + num_new
        is_token = None
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] != num_all:
                raise ValueError(
                    f"attention_mask has shape {list(attention_mask.shape)}; it must be "
                    f"[batch, {num_all}]: {num_past} cached and {num_new} new tokens"
                )
            is_token = None if bool(attention_mask.all()) else attention_mask.bool()
        place = torch.arange(num_all, device=device)
        query_place = place[num_past:, None]
        mask = None
        if is_token is not None:  # padding sees itself: no row of a softmax may be empty
            mask = (place <= query_place) & is_token[:, None, None] | (place == query_place)
        elif num_past > 0 and num_new > 1:
            mask = (place <= query_place)[None, None]
        if position_ids is None:
            position_ids = place[None, num_past:]
            if is_token is not None:
                position_ids = (is_token.cumsum(-1) - 1).clamp(min=0)[:, num_past:]
        cos, sin = self.rope_table(position_ids, at_least_fp32(embeddings[:0]).dtype)
        return Step(cos, sin, is_token, mask, cache)

    def rope_table(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin [b, 1, s, rotary dims] of positions [b, s]."""
        rotary = self.rotary_size
        exponent = torch.arange(0, rotary, 2, device=position_ids.device).to(dtype) / rotary
        frequency, scale = rope_frequencies(self.config, self.config.rope_theta**exponent)
        angle = position_ids[:, None, :, None].to(dtype) * frequency
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos() * scale, angle.sin() * scale

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BailingMoeV2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the normed hidden states [b, s, h] of the new tokens, and the advanced cache."""
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = BailingMoeV2Cache()
        step = self.make_step(inputs_embeds, attention_mask, position_ids, past_key_values)
        x = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            x = layer(x, step)
        if past_key_values is not None:
            past_key_values.num_tokens += x.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values
        )


class BailingMoeV2ForCausalLM(BailingMoeV2PreTrainedModel, GenerationMixin):
    """Ling 2.0 with its language-model head."""

    trunk_class = BailingMoeV2Model

    def __init__(self, config: BailingMoeV2Config) -> None:
        """Make the trunk and an untied head."""
        super().__init__(config)
        self.model = self.trunk_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding (a name that transformers asks for)."""
        return self.model.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding (a name that transformers asks for)."""
        self.model.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head (a name that transformers asks for)."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head (a name that transformers asks for)."""
        self.lm_head = new_embeddings

    def project(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits [b, s, v] of normed hidden states [b, s, h]."""
        return at_least_fp32(self.lm_head(hidden))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Return False: `generate` leaves the cache to `forward`."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BailingMoeV2Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return fp32 logits [b, s, v], of the last `logits_to_keep` tokens if that is not 0.

        Args:
            input_ids: [b, s] new tokens.
            attention_mask: [b, p + s], 0 at (left) padding.
            position_ids: [b, s]; counted over real tokens if absent.
            past_key_values: what an earlier call returned; it is advanced in place.
            inputs_embeds: [b, s, h], instead of input_ids.
            labels: [b, s], unshifted, -100 where there is no target; adds the mean loss.
            use_cache: whether to return a cache; by default where the model is not training.
            logits_to_keep: how many last positions go through the head.
            return_dict: False for a tuple.
            kwargs: go to transformers' loss function.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        logits = self.project(out.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=out.past_key_values
        )
        return result.to_tuple() if return_dict is False else result

    def mtp_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Return fp32 logits [b, s, v] for each depth k = 1..; position t predicts token t + k + 1.

        A position whose next token lies behind the end of the row sees token 0 instead; its
        logits mean nothing.
        """
        hidden = self.model(input_ids, attention_mask, use_cache=False).last_hidden_state
        step = self.model.make_step(hidden, attention_mask, None, None)
        logits = []
        for layer in self.model.layers[self.config.num_hidden_layers :]:
            input_ids = F.pad(input_ids[:, 1:], (0, 1))
            hidden = layer.predict(self.model.word_embeddings(input_ids), hidden, step)
            logits.append(self.project(hidden))
        return logits

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: BailingMoeV2Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 1,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of the next forward: only the tokens that the cache has not seen."""
        num_past = 0 if past_key_values is None else past_key_values.num_tokens
        if input_ids.shape[1] <= num_past:
            raise ValueError(
                f"generate was given {input_ids.shape[1]} tokens and a cache of {num_past}; "
                "pass the whole sequence, cached tokens included"
            )
        input_ids = input_ids[:, num_past:]
        if position_ids is not None:
            position_ids = position_ids[:, -input_ids.shape[1] :]
        return {
            "input_ids": input_ids.contiguous(),
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }
