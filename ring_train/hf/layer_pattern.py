"""Softmax attention made into lightning attention, as Ring-linear was made from Ling 2.0, and back.

A softmax layer becomes lightning by giving each query head a key and a value head of its own:
head j gets head floor(j / (n/g)) (model-spec 4.2). Its output gate and the norm in front are new.
Back, the key and value heads that serve a group are averaged (GQA, arXiv 2305.13245, section 2.1)
and gate and norm go; of a model that was just converted this gives the very bytes it came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ring_train.config import Architecture, ModelConfig, NewGates
from ring_train.ops.drawing import named_generator
from ring_train.plan.layers import token_mixers

ATTENTION = re.compile(r"decoder\.layers\.(\d+)\.self_attention\.(.+)")
QKV, GATE, GATE_NORM = "linear_qkv.weight", "linear_gate.weight", "gate_norm.weight"

Read = Callable[[str], Tensor]
"""From the trainer's name of a tensor to the whole tensor."""


def expand_key_values(qkv: Tensor, num_groups: int, channels: int) -> Tensor:
    """Return [3 n d, h], per head its query, key and value, from [(n + 2g) d, h], see `hf.table`.

    Args:
        qkv: of softmax attention.
        num_groups: g, key and value heads.
        channels: d, of one head.
    """
    heads = qkv.unflatten(0, (num_groups, -1, channels))  # [g, n/g + 2, d, h]
    query = heads[:, :-2]
    key, value = (heads[:, place, None].expand_as(query) for place in (-2, -1))
    return torch.stack((query, key, value), dim=2).flatten(0, 3)


def pool_key_values(qkv: Tensor, num_groups: int, channels: int) -> Tensor:
    """Return [(n + 2g) d, h] from [3 n d, h]: keys and values averaged over each group of heads.

    The mean is taken in fp64, so that of equal heads it is exactly one of them.
    """
    heads = qkv.unflatten(0, (num_groups, -1, 3, channels))  # [g, n/g, 3, d, h]
    key_value = heads[:, :, 1:].double().mean(1).to(qkv.dtype)  # [g, 2, d, h]
    return torch.cat((heads[:, :, 0], key_value), dim=1).flatten(0, 2)


def with_layer_pattern(
    read: Read, source: ModelConfig, target: ModelConfig, *, gates: NewGates, seed: int
) -> Read:
    """Return a reader of the tensors that a model has under another `layer_group_size`.

    Args:
        read: tensors of `source`.
        source: the model as it is.
        target: the same with another layer pattern, see `layer_pattern_problems`.
        gates: what new output gates start from.
        seed: of what is drawn.
    """
    before, after = token_mixers(source), token_mixers(target)

    def read_changed(name: str) -> Tensor:
        match = ATTENTION.fullmatch(name)
        if match is None or before[int(match[1])] == after[int(match[1])]:
            return read(name)
        if after[int(match[1])] == "gqa":
            return _softmax_tensor(read, name, target)
        return _lightning_tensor(read, name, target, gates, seed)

    return read_changed


def _softmax_tensor(read: Read, name: str, model: ModelConfig) -> Tensor:
    tensor = read(name)
    if name.endswith(QKV):
        return pool_key_values(tensor, model.num_query_groups, model.kv_channels)
    return tensor


def _lightning_tensor(
    read: Read, name: str, model: ModelConfig, gates: NewGates, seed: int
) -> Tensor:
    width = model.num_attention_heads * model.kv_channels
    if name.endswith(GATE_NORM):
        return torch.ones(width)
    if name.endswith(GATE):
        shape = (width, model.hidden_size)
        if gates is NewGates.zero:
            return torch.zeros(shape)
        generator = named_generator(seed, name)
        return torch.empty(shape).normal_(0.0, model.init_method_std, generator=generator)
    if name.endswith(QKV):
        return expand_key_values(read(name), model.num_query_groups, model.kv_channels)
    return read(name)


def layer_pattern_problems(source: ModelConfig, group: int) -> list[str]:
    """Return why a model cannot get `layer_group_size=group`, one line each."""
    before, num_layers = source.layer_group_size, source.num_layers
    if group == before:
        return []
    if source.architecture is Architecture.bailing_moe:
        return [
            f"layer_group_size={group}, but {source.architecture} has no QK-norm, which lightning "
            "layers of Ring-linear 2.0 need; only Ling 2.0 and Ring-linear 2.0 can be converted"
        ]
    if group < 1 or num_layers % group:
        divisors = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
        return [
            f"layer_group_size={group} does not divide num_hidden_layers={num_layers}; "
            f"choose from {divisors}"
        ]
    if group % before and before % group:
        return [
            f"layer_group_size={group} is neither a multiple nor a divisor of {before}, which the "
            "folder has: some layers would become lightning and others softmax; choose a multiple "
            "or a divisor"
        ]
    if group < before and source.linear_silu:
        return [
            f"layer_group_size={group} makes lightning layers softmax, but linear_silu=true: "
            "softmax layers have no SiLU on queries and keys; choose a multiple of "
            f"{before}"
        ]
    return []
