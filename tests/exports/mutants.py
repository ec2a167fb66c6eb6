"""Faults that an exported folder could have, each put into a right one.

Each is a mistake that public exporters or importers have shipped, or one letter away from that:
most of them load without complaint. `test_mutants.py` shows that a certificate names every one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
MODELING = "modeling_bailing_moe_v2.py"
FIRST_MODELING = "modeling_bailing_moe.py"
LINEAR_MODELING = "modeling_bailing_moe_linear_v2.py"
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
"""Of the golden models."""


@dataclass(frozen=True)
class Mutant:
    """One fault of a folder."""

    fault: str
    change: Callable[[Path], None]
    noticed_by: str
    """A check that must fail; others may."""
    base: str = "linear"
    """Which right folder it is put into."""


def weights(change: Callable[[Tensors], None]) -> Callable[[Path], None]:
    """Return what changes the tensors of a folder; they end up in one shard."""

    def mutate(folder: Path) -> None:
        tensors: Tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors.update(load_file(path))
            path.unlink()
        (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        change(tensors)
        contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})

    return mutate


def config(**values: Any) -> Callable[[Path], None]:
    """Return what sets keys of config.json; None removes one."""
    return _json("config.json", values)


def generation_config(**values: Any) -> Callable[[Path], None]:
    """Return what sets keys of generation_config.json."""
    return _json("generation_config.json", values)


def _json(name: str, values: dict[str, Any]) -> Callable[[Path], None]:
    def mutate(folder: Path) -> None:
        path = folder / name
        merged = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({k: v for k, v in merged.items() if v is not REMOVED}))

    return mutate


REMOVED = object()


def text(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Return what replaces a piece of text that a file holds exactly once."""

    def mutate(folder: Path) -> None:
        content = (folder / name).read_text()
        assert content.count(old) == 1, (name, old, content.count(old))
        (folder / name).write_text(content.replace(old, new))

    return mutate


def swap(tensors: Tensors, one: str, other: str) -> None:
    """Exchange the tensors whose names contain `one` and `other` in the same place."""
    pairs = [(name, name.replace(one, other)) for name in tensors if one in name]
    assert pairs
    for name, partner in pairs:
        tensors[name], tensors[partner] = tensors[partner], tensors[name]


def change_all(ending: str, function: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    """Return what applies a function to every tensor whose name has an ending."""

    def change(tensors: Tensors) -> None:
        names = [name for name in tensors if name.endswith(ending)]
        assert names, ending
        for name in names:
            tensors[name] = function(tensors[name])

    return weights(change)


def megatron_order(qkv: Tensor) -> Tensor:
    """Return rows per query group: its queries, its key, its value."""
    groups = HEADS if qkv.shape[0] == 3 * HEADS * HEAD_DIM else KV_HEADS
    sizes = [HEADS * HEAD_DIM, groups * HEAD_DIM, groups * HEAD_DIM]
    q, k, v = (part.unflatten(0, (groups, -1)) for part in qkv.split(sizes))
    return torch.cat([q, k, v], dim=1).flatten(0, 1)


def interleaved_rows(qkv: Tensor) -> Tensor:
    """Return rows as for a rope over pairs (2i, 2i + 1), in the half of each head that rotates."""
    heads = qkv.unflatten(0, (-1, HEAD_DIM)).clone()
    rotated = heads[:-KV_HEADS, : HEAD_DIM // 2]
    order = torch.arange(HEAD_DIM // 2).view(2, -1).T.flatten()
    heads[:-KV_HEADS, : HEAD_DIM // 2] = rotated[:, order]
    return heads.flatten(0, 1)


def drop_mtp(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.layers.4.")]:
        del tensors[name]


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return what does one thing after the other."""

    def mutate(folder: Path) -> None:
        for change in changes:
            change(folder)

    return mutate


def roll_experts(tensors: Tensors) -> None:
    for layer in range(1, 5):
        swap_in_layer(tensors, layer, "experts.0.", "experts.5.")


def swap_in_layer(tensors: Tensors, layer: int, one: str, other: str) -> None:
    prefix = f"model.layers.{layer}.mlp."
    swap(tensors, prefix + one, prefix + other)


def not_a_number(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.experts.3.up_proj.weight"][2, 5] = torch.nan


def extra_tensor(tensors: Tensors) -> None:
    tensors["model.layers.0.attention.slope"] = torch.ones(HEADS)


def missing_tensor(tensors: Tensors) -> None:
    del tensors["model.layers.2.attention.key_layernorm.weight"]


def tied_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.word_embeddings.weight"].clone()


def all_bf16_values(tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.bfloat16().float()


def eh_proj_halves(weight: Tensor) -> Tensor:
    return torch.cat(weight.chunk(2, dim=1)[::-1], dim=1)


def truncated(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-16])


def wrong_shard(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(name for name, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][name] = second
    path.write_text(json.dumps(index))


def swapped_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    path.write_text(json.dumps(tokenizer))


def added(name: str, content: str) -> Callable[[Path], None]:
    """Return what writes a file."""

    def mutate(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)

    return mutate


TEMPLATE = "tokenizer_config.json"
"""Its chat_template is JSON: a backslash in it is two."""

MUTANTS = {
    "decay_of_the_next_layer": Mutant(
        "slope off by one: the modeling file counts layers from 1",
        text(LINEAR_MODELING, "place = layer_index if", "place = layer_index + 1 if"),
        "decay",
    ),
    "other_decay_rule": Mutant(
        "decay_layer_rule is the other one", config(decay_layer_rule="shifted"), "decay"
    ),
    "no_decay_rule": Mutant(
        "decay_layer_rule is missing", config(decay_layer_rule=REMOVED), "config"
    ),
    "decay_of_the_other_heads": Mutant(
        "heads decay in the opposite order",
        text(
            LINEAR_MODELING,
            "head_slopes(config.num_attention_heads)]",
            "head_slopes(config.num_attention_heads)[::-1]]",
        ),
        "decay",
    ),
    "whole_rotary_in_config": Mutant(
        "half rotary: partial_rotary_factor is 1", config(partial_rotary_factor=1.0), "rope"
    ),
    "no_rotary_factor": Mutant(
        "partial_rotary_factor is missing", config(partial_rotary_factor=REMOVED), "config"
    ),
    "whole_rotary_in_code": Mutant(
        "half rotary: the modeling file turns every channel",
        text(
            MODELING,
            "int(self.config.head_dim * self.config.partial_rotary_factor)",
            "self.config.head_dim",
        ),
        "rope",
    ),
    "interleaved_rope_in_code": Mutant(
        "interleaved rope: the modeling file turns pairs (2i, 2i + 1)",
        text(
            MODELING,
            "    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin\n",
            "    first, second = turned[..., ::2], turned[..., 1::2]\n"
            "    half = rotary // 2\n"
            "    cos, sin = cos[..., :half], sin[..., :half]\n"
            "    pair = [first * cos - second * sin, second * cos + first * sin]\n"
            "    turned = torch.stack(pair, dim=-1).flatten(-2)\n",
        ),
        "transformers_one_pass",
    ),
    "interleaved_rope_in_weights": Mutant(
        "interleaved rope: rows of queries and keys are laid out for it",
        change_all("query_key_value.weight", interleaved_rows),
        "weights",
    ),
    "rope_theta": Mutant("rope_theta is 10000 times too small", config(rope_theta=60.0), "rope"),
    "megatron_qkv": Mutant(
        "QKV rows in Megatron's order",
        change_all("query_key_value.weight", megatron_order),
        "weights",
    ),
    "gate_up_swapped": Mutant(
        "gate and up projections swapped",
        weights(lambda t: swap(t, "gate_proj", "up_proj")),
        "weights",
    ),
    "experts_swapped": Mutant("two experts swapped", weights(roll_experts), "weights"),
    "bias_bf16": Mutant(
        "expert bias cast to bf16", change_all("expert_bias", Tensor.bfloat16), "tensors"
    ),
    "bias_rounded": Mutant(
        "expert bias rounded to bf16 and stored in fp32",
        change_all("expert_bias", lambda t: t.bfloat16().float()),
        "weights",
    ),
    "bias_zeroed": Mutant(
        "expert bias zeroed", change_all("expert_bias", torch.zeros_like), "weights"
    ),
    "bias_cast_on_load": Mutant(
        "the modeling file keeps the expert bias in the dtype of the weights",
        text(
            MODELING,
            "ranks = scores + self.expert_bias",
            "ranks = scores + self.expert_bias.bfloat16()",
        ),
        "transformers_one_pass",
    ),
    "bias_as_weight": Mutant(
        "experts are weighted by their biased scores",
        text(MODELING, "weights = scores.gather", "weights = (scores + self.expert_bias).gather"),
        "transformers_one_pass",
    ),
    "gate_norm_sliced": Mutant(
        "gate norm sliced to the channels of one rank",
        change_all("g_norm.weight", lambda t: t[: len(t) // 2]),
        "tensors",
    ),
    "gate_norm_repeated": Mutant(
        "gate norm of one rank repeated for the other",
        change_all("g_norm.weight", lambda t: t[: len(t) // 2].repeat(2)),
        "weights",
    ),
    "gate_norm_groups": Mutant("group_norm_size is 1", config(group_norm_size=1), "config"),
    "mtp_dropped": Mutant("MTP tensors dropped", weights(drop_mtp), "tensors"),
    "mtp_dropped_everywhere": Mutant(
        "MTP tensors and their config key dropped",
        both(weights(drop_mtp), config(num_nextn_predict_layers=0)),
        "tensors",
    ),
    "mtp_halves": Mutant(
        "eh_proj takes the hidden state first",
        change_all("eh_proj.weight", eh_proj_halves),
        "weights",
    ),
    "mtp_norms": Mutant(
        "enorm and hnorm swapped", weights(lambda t: swap(t, "enorm", "hnorm")), "weights"
    ),
    "rms_eps": Mutant("rms_norm_eps is 1e-5", config(rms_norm_eps=1e-5), "config"),
    "no_scaling": Mutant(
        "routed_scaling_factor is missing", config(routed_scaling_factor=REMOVED), "config"
    ),
    "scaling_one": Mutant(
        "routed_scaling_factor is 1", config(routed_scaling_factor=1.0), "router"
    ),
    "shared_scaled": Mutant(
        "the shared expert is scaled like routed ones",
        text(MODELING, "+ self.shared_experts(x)", "+ self.gate.scale * self.shared_experts(x)"),
        "transformers_one_pass",
    ),
    "dense_transposed": Mutant(
        "attention.dense transposed",
        change_all("attention.dense.weight", lambda t: t.T),
        "weights",
    ),
    "qk_norms": Mutant(
        "query and key norm swapped",
        weights(lambda t: swap(t, "query_layernorm", "key_layernorm")),
        "weights",
    ),
    "block_norms": Mutant(
        "input and post-attention norm swapped",
        weights(lambda t: swap(t, "input_layernorm", "post_attention_layernorm")),
        "weights",
    ),
    "lm_head_tied": Mutant("lm_head is the embedding", weights(tied_head), "weights"),
    "embedding_rows": Mutant(
        "embedding rows one id further",
        change_all("word_embeddings.weight", lambda t: t.roll(1, 0)),
        "weights",
    ),
    "kv_order": Mutant(
        "key-value heads repeated in turn, not one after another",
        text(
            MODELING,
            "z.repeat_interleave(queries_per_kv, dim=1)",
            "z.repeat(1, queries_per_kv, 1, 1)",
        ),
        "transformers_one_pass",
    ),
    "rounded_values": Mutant(
        "fp32 values rounded to bf16 on the way", weights(all_bf16_values), "weights"
    ),
    "half_precision": Mutant(
        "one tensor in fp16", change_all("model.norm.weight", Tensor.half), "tensors"
    ),
    "not_a_number": Mutant("one NaN", weights(not_a_number), "tensors"),
    "missing_tensor": Mutant("one tensor missing", weights(missing_tensor), "tensors"),
    "extra_tensor": Mutant("slopes stored as a tensor", weights(extra_tensor), "tensors"),
    "truncated_shard": Mutant("a shard truncated by 16 bytes", truncated, "tensors"),
    "wrong_index": Mutant("the index names the wrong shard", wrong_shard, "tensors"),
    "layers_swapped": Mutant(
        "layers 1 and 3 swapped",
        weights(lambda t: swap(t, "model.layers.1.", "model.layers.3.")),
        "weights",
        base="softmax",
    ),
    "layer_group_size": Mutant(
        "layer_group_size is missing", config(layer_group_size=REMOVED), "config"
    ),
    "silu": Mutant("linear_silu is true", config(linear_silu=True), "config"),
    "gate_sigmoid": Mutant(
        "the output gate is a silu",
        text(
            LINEAR_MODELING,
            "at_least_fp32(self.g_proj(x)).sigmoid()",
            "F.silu(at_least_fp32(self.g_proj(x)))",
        ),
        "transformers_one_pass",
    ),
    "state_lost": Mutant(
        "the state is not carried from one call to the next",
        text(LINEAR_MODELING, "step.cache.tensors[key] = state", "pass"),
        "transformers_token_by_token",
    ),
    "state_late": Mutant(
        "the state decays by one token too few at the end of a piece",
        text(
            LINEAR_MODELING,
            "torch.exp(-rate * num_tokens) * state",
            "torch.exp(-rate * (num_tokens - 1)) * state",
        ),
        "transformers_token_by_token",
    ),
    "keys_twice": Mutant(
        "positions begin again with every call",
        text(
            MODELING,
            "position_ids = place[None, num_past:]",
            "position_ids = place[None, :num_new]",
        ),
        "transformers_prefill_in_pieces",
    ),
    "padding_seen": Mutant(
        "padding goes into the state",
        text(LINEAR_MODELING, "if step.is_token is not None:", "if False:"),
        "transformers_padded_batch",
    ),
    "wrong_stop": Mutant(
        "generation stops at another token",
        generation_config(eos_token_id=[7]),
        "generation_config",
    ),
    "no_turn_end": Mutant(
        "generation does not stop at the end of a turn",
        lambda folder: generation_config(
            eos_token_id=[json.loads((folder / "config.json").read_text())["eos_token_id"]]
        )(folder),
        "generation_config",
    ),
    "penalised": Mutant(
        "generation_config.json has a penalty for what was said",
        generation_config(repetition_penalty=3.0),
        "generation_config",
    ),
    "generation_limits": Mutant(
        "generation_config.json suppresses tokens and sets lengths and a temperature",
        generation_config(
            suppress_tokens=[10, 11], min_new_tokens=50, max_new_tokens=70, temperature=0.01
        ),
        "generation_config",
    ),
    "rare_branch": Mutant(
        "the modeling file is wrong on rows that no certificate reads",
        text(
            MODELING,
            "    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin\n",
            "    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin\n"
            "    if turned.shape[2] > 256: turned = -turned.flip(-1)\n",
        ),
        "modeling_files",
    ),
    "further_code": Mutant(
        "a Python file that no export writes", added("extra.py", "x = 1\n"), "modeling_files"
    ),
    "own_generate": Mutant(
        "custom_generate/ replaces decoding",
        added(
            "custom_generate/generate.py", "def generate(model, input_ids, **_):\n    return 0\n"
        ),
        "modeling_files",
    ),
    "two_dtypes": Mutant(
        "dtype is not torch_dtype", config(dtype="float16"), "config", base="softmax"
    ),
    "no_tokenizer": Mutant(
        "tokenizer.json is missing",
        lambda folder: (folder / "tokenizer.json").unlink(),
        "tokenizer",
    ),
    "damaged_tokenizer": Mutant(
        "tokenizer.json is no JSON", added("tokenizer.json", "{"), "tokenizer"
    ),
    "wrong_eos": Mutant("eos_token_id of config.json", config(eos_token_id=7), "config"),
    "template_role": Mutant(
        "the chat template calls the user USER",
        text(TEMPLATE, "<role>HUMAN</role>", "<role>USER</role>"),
        "chat",
    ),
    "template_newline": Mutant(
        "the generation prompt ends with a newline",
        text(
            TEMPLATE,
            "add_generation_prompt -%}{{- '<role>ASSISTANT</role>' -}}",
            "add_generation_prompt -%}{{- '<role>ASSISTANT</role>\\\\n' -}}",
        ),
        "chat",
    ),
    "swapped_tokens": Mutant("two tokens of the tokenizer swapped", swapped_tokens, "tokenizer"),
    "topk_group": Mutant("topk_group is 1 more", config(topk_group=3), "router"),
    "n_group": Mutant("n_group is missing", config(n_group=REMOVED), "config", base="softmax"),
    "no_score_function": Mutant(
        "score_function is missing", config(score_function=REMOVED), "router", base="softmax"
    ),
    "no_rmsnorm": Mutant("use_rmsnorm is missing", config(use_rmsnorm=REMOVED), "config"),
    "router_bf16": Mutant(
        "router logits in bf16",
        text(
            MODELING,
            "F.linear(at_least_fp32(x), at_least_fp32(self.weight))",
            "F.linear(x.bfloat16(), self.weight.bfloat16()).float()",
        ),
        "transformers_one_pass",
        base="softmax",
    ),
    "groups_by_best": Mutant(
        "groups are ranked by their best expert alone",
        text(MODELING, "groups.topk(2, dim=-1)", "groups.topk(1, dim=-1)"),
        "transformers_one_pass",
    ),
    "yarn_dropped": Mutant("rope_scaling is null", config(rope_scaling=None), "rope", base="yarn"),
    "yarn_factor": Mutant(
        "YaRN by 2, not by 4",
        lambda folder: config(
            rope_scaling={
                **json.loads((folder / "config.json").read_text())["rope_scaling"],
                "factor": 2.0,
            }
        )(folder),
        "rope",
        base="yarn",
    ),
    "yarn_unscaled": Mutant(
        "YaRN without the factor of cos and sin",
        text(
            MODELING, "return frequencies, 0.1 * math.log(factor) + 1.0", "return frequencies, 1.0"
        ),
        "rope",
        base="yarn",
    ),
    "yarn_linear": Mutant(
        "positions divided by the factor, quick channels too",
        text(
            MODELING,
            "slowed = ((channels - low) / width).clamp(0, 1)",
            "slowed = torch.ones_like(channels)",
        ),
        "rope",
        base="yarn",
    ),
    "no_norm_head": Mutant(
        "norm_head is missing (first generation)",
        config(norm_head=REMOVED),
        "config",
        base="first",
    ),
    "head_by_rows": Mutant(
        "the head is normalised over hidden channels (first generation)",
        text(FIRST_MODELING, "weight, dim=0, dtype=dtype)", "weight[:128], dim=1, dtype=dtype)"),
        "transformers_one_pass",
        base="first",
    ),
    "sigmoid_router": Mutant(
        "the router is a sigmoid (first generation)",
        text(FIRST_MODELING, ".softmax(-1)  # [t, e] fp32", ".sigmoid()"),
        "transformers_one_pass",
        base="first",
    ),
    "half_rotary_of_the_second": Mutant(
        "half of the channels turn (first generation)",
        text(FIRST_MODELING, "return self.config.head_dim", "return self.config.head_dim // 2"),
        "rope",
        base="first",
    ),
    "one_shared_expert": Mutant(
        "the shared experts are one (first generation)",
        config(num_shared_experts=1),
        "config",
        base="first",
    ),
}
