"""Tensor names: one entry per tensor of the trainer, and the Hugging Face tensors it becomes.

The table of a model is total (every tensor of the folder, buffers included) and injective (no
Hugging Face name twice). Every entry is a linear map that permutes and splits rows, so it serves
weights and gradients alike.

Unusual: Megatron lays the rows of a fused qkv projection out per query group - its queries, its
key, its value -, Hugging Face as all queries, all keys, all values (model-spec 2.1 and 3.1).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ring_train.config import ModelConfig
from ring_train.hf.errors import HfError
from ring_train.hf.fp8 import Fp8Scale
from ring_train.plan.layers import channel_mixers, token_mixers
from ring_train.plan.mixers import MTP_MIXERS

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the trainer and what it is called in a folder."""

    logical: str
    """Name in the trainer, free of layout."""
    hf: tuple[str, ...]
    """Names in the folder; the rows of the tensor are theirs, one after another."""
    hf_shapes: tuple[Shape, ...]
    """Shape of each of them."""
    head_order: tuple[int, ...] | None = None
    """Head i of the folder is head head_order[i] of the trainer; None: rows stay in order."""
    fp32: bool = False
    """Stays fp32 whatever the dtype of the folder."""
    fp8: tuple[Fp8Scale, ...] | None = None
    """How each of `hf` is scaled in a block-FP8 folder; None: it is bf16 there."""

    @property
    def shape(self) -> Shape:
        """Shape in the trainer."""
        rows = sum(shape[0] for shape in self.hf_shapes)
        return (rows, *self.hf_shapes[0][1:])

    def to_hf(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the tensors of the folder that this tensor of the trainer becomes."""
        assert tuple(tensor.shape) == self.shape, (self.logical, tuple(tensor.shape), self.shape)
        if self.head_order is not None:
            heads = tensor.unflatten(0, (len(self.head_order), -1))
            tensor = heads[torch.tensor(self.head_order, device=tensor.device)].flatten(0, 1)
        rows = tensor.split([shape[0] for shape in self.hf_shapes])
        return dict(zip(self.hf, rows, strict=True))

    def from_hf(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the tensor of the trainer that these tensors of a folder make."""
        parts = [tensors[name] for name in self.hf]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.head_order is None:
            return tensor
        heads = tensor.unflatten(0, (len(self.head_order), -1))
        order = torch.tensor(self.head_order, device=tensor.device)
        return heads[order.argsort()].flatten(0, 1)


def make_table(model: ModelConfig) -> dict[str, Entry]:
    """Return the entries of a model by their name in the trainer, in the order of a folder."""
    width, vocab = model.hidden_size, model.vocab_size
    entries = [
        _plain("embedding.word_embeddings.weight", "model.word_embeddings.weight", vocab, width),
    ]
    mixers = zip(token_mixers(model), channel_mixers(model), strict=True)
    for index, pair in enumerate(mixers):
        entries += _layer(model, f"decoder.layers.{index}.", f"model.layers.{index}.", pair)
    for depth in range(model.mtp_num_layers):
        entries += _mtp_layer(model, depth)
    entries += [
        _plain("decoder.final_layernorm.weight", "model.norm.weight", width),
        _plain("output_layer.weight", "lm_head.weight", vocab, width),
    ]
    table = {entry.logical: entry for entry in entries}
    hf_names = [name for entry in entries for name in entry.hf]
    assert len(table) == len(entries)
    assert len(set(hf_names)) == len(hf_names)
    return table


def check_names(model: ModelConfig, names: Iterable[str]) -> None:
    """Raise HfError, naming some, unless these are the tensors of a model."""
    wanted, given = make_table(model).keys(), set(names)
    for problem, differing in (("lacks", wanted - given), ("has besides", given - wanted)):
        if differing:
            raise HfError(
                f"the checkpoint {problem} {len(differing)} tensors, first {min(differing)}; it is "
                "of another model than its config.yaml says"
            )


def _plain(
    logical: str, hf: str, *shape: int, fp32: bool = False, fp8: Fp8Scale | None = None
) -> Entry:
    """Return an entry whose tensor is the same on both sides."""
    scales = None if fp8 is None else (fp8,)
    return Entry(logical=logical, hf=(hf,), hf_shapes=(shape,), fp32=fp32, fp8=scales)


def _mtp_layer(model: ModelConfig, depth: int) -> list[Entry]:
    """Return the entries of one MTP depth: in a folder it is one more layer."""
    width = model.hidden_size
    logical, hf = f"mtp.layers.{depth}.", f"model.layers.{model.num_layers + depth}."
    norms = ("enorm", "hnorm", "final_layernorm")
    return [
        *(_plain(f"{logical}{norm}.weight", f"{hf}{norm}.weight", width) for norm in norms),
        _plain(f"{logical}eh_proj.weight", f"{hf}eh_proj.weight", width, 2 * width),
        *_layer(model, f"{logical}transformer_layer.", hf, MTP_MIXERS),
    ]


def _layer(model: ModelConfig, logical: str, hf: str, mixers: tuple[str, str]) -> list[Entry]:
    """Return the entries of one decoder layer with the given token and channel mixer."""
    width = model.hidden_size
    token, channel = mixers
    norms = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    return [
        *(_plain(f"{logical}{a}.weight", f"{hf}{b}.weight", width) for a, b in norms.items()),
        *TOKEN_ENTRIES[token](model, f"{logical}self_attention.", f"{hf}attention."),
        *CHANNEL_ENTRIES[channel](model, f"{logical}mlp.", f"{hf}mlp."),
    ]


def _attention(model: ModelConfig, logical: str, hf: str, num_groups: int) -> list[Entry]:
    """Return the entries that softmax and lightning attention share."""
    channels, heads = model.kv_channels, model.num_attention_heads
    width = heads * channels
    entries = [
        Entry(
            logical=f"{logical}linear_qkv.weight",
            hf=(f"{hf}query_key_value.weight",),
            hf_shapes=(((heads + 2 * num_groups) * channels, model.hidden_size),),
            head_order=_qkv_head_order(heads, num_groups),
            fp8=(Fp8Scale.exact,),
        ),
        _plain(
            f"{logical}linear_proj.weight",
            f"{hf}dense.weight",
            model.hidden_size,
            width,
            fp8=Fp8Scale.power_of_two,
        ),
    ]
    if model.qk_layernorm:
        norms = {"q_layernorm": "query_layernorm", "k_layernorm": "key_layernorm"}
        for ours, theirs in norms.items():
            entries.append(_plain(f"{logical}{ours}.weight", f"{hf}{theirs}.weight", channels))
    return entries


def _qkv_head_order(num_heads: int, num_groups: int) -> tuple[int, ...]:
    """Return for each head of [all q, all k, all v] its place among [q.. k v] per group."""
    queries = num_heads // num_groups
    starts = [group * (queries + 2) for group in range(num_groups)]
    return (
        *(start + query for start in starts for query in range(queries)),
        *(start + queries for start in starts),
        *(start + queries + 1 for start in starts),
    )


def _gqa(model: ModelConfig, logical: str, hf: str) -> list[Entry]:
    """Return the entries of softmax attention."""
    return _attention(model, logical, hf, model.num_query_groups)


def _lightning(model: ModelConfig, logical: str, hf: str) -> list[Entry]:
    """Return the entries of lightning attention, whose every head has its own key and value."""
    width = model.num_attention_heads * model.kv_channels
    return [
        *_attention(model, logical, hf, model.num_attention_heads),
        _plain(
            f"{logical}linear_gate.weight",
            f"{hf}g_proj.weight",
            width,
            model.hidden_size,
            fp8=Fp8Scale.exact,
        ),
        _plain(f"{logical}gate_norm.weight", f"{hf}g_norm.weight", width),
    ]


def _mlp(
    width: int, ffn_size: int, logical: str, hf: str, gate_up: Fp8Scale = Fp8Scale.exact
) -> list[Entry]:
    """Return the entries of a SwiGLU: gate and up rows are one tensor in the trainer."""
    return [
        Entry(
            logical=f"{logical}linear_fc1.weight",
            hf=(f"{hf}gate_proj.weight", f"{hf}up_proj.weight"),
            hf_shapes=((ffn_size, width), (ffn_size, width)),
            fp8=(gate_up, gate_up),
        ),
        _plain(
            f"{logical}linear_fc2.weight",
            f"{hf}down_proj.weight",
            width,
            ffn_size,
            fp8=Fp8Scale.exact,
        ),
    ]


def _dense(model: ModelConfig, logical: str, hf: str) -> list[Entry]:
    """Return the entries of a dense MLP."""
    return _mlp(model.hidden_size, model.ffn_hidden_size, logical, hf)


def _moe(model: ModelConfig, logical: str, hf: str) -> list[Entry]:
    """Return the entries of router, routed experts and shared experts."""
    width, experts = model.hidden_size, model.num_moe_experts
    assert experts is not None
    entries = [_plain(f"{logical}router.weight", f"{hf}gate.weight", experts, width)]
    if model.moe_router_enable_expert_bias:
        bias = "expert_bias"
        entries.append(_plain(f"{logical}router.{bias}", f"{hf}gate.{bias}", experts, fp32=True))
    for expert in range(experts):
        name = f"experts.{expert}."
        size = model.moe_ffn_hidden_size
        entries += _mlp(width, size, logical + name, hf + name, Fp8Scale.power_of_two)
    if model.moe_shared_expert_intermediate_size is not None:
        name = "shared_experts."
        size = model.moe_shared_expert_intermediate_size
        entries += _mlp(width, size, logical + name, hf + name)
    return entries


TOKEN_ENTRIES = {"gqa": _gqa, "lightning": _lightning}
"""Token mixer -> function(model, logical prefix, folder prefix) of its entries."""

CHANNEL_ENTRIES = {"dense": _dense, "moe": _moe}
"""Channel mixer -> function(model, logical prefix, folder prefix) of its entries."""
