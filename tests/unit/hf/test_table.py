import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_train.config import ModelConfig, compose
from ring_train.hf.config import read_model_config
from ring_train.hf.shards import read_stored
from ring_train.hf.table import make_table
from ring_train.plan import make_plan
from tests.unit.hf.conftest import GOLDEN, RULES

PRESETS = (
    "ring_mini_linear_2_0",
    "ring_flash_linear_2_0",
    "ling_mini_2_0",
    "ling_flash_2_0",
    "ling_1t",
    "ring_lite",
    "small",
    "tiny",
)


TINY: ModelConfig = compose("pretrain", ["model=tiny"]).model


@pytest.mark.parametrize("name", RULES)
def test_the_table_names_and_shapes_what_a_folder_holds(name: str) -> None:
    table = make_table(read_model_config(GOLDEN / name, RULES[name]))
    shapes = {
        hf: shape
        for entry in table.values()
        for hf, shape in zip(entry.hf, entry.hf_shapes, strict=True)
    }
    assert shapes == {hf: stored.shape for hf, stored in read_stored(GOLDEN / name).items()}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_counts_the_parameters_of_the_plan(preset: str) -> None:
    config = compose("pretrain", [f"model={preset}"])
    cost = make_plan(config, 1).cost
    table = make_table(config.model)
    total = sum(math.prod(entry.shape) for entry in table.values())
    assert total == cost.num_parameters + cost.num_mtp_parameters


def test_logical_names_of_a_hybrid_model(tiny: ModelConfig) -> None:
    names = set(make_table(tiny))
    assert {
        "embedding.word_embeddings.weight",
        "output_layer.weight",
        "decoder.final_layernorm.weight",
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.q_layernorm.weight",
        "decoder.layers.0.self_attention.k_layernorm.weight",
        "decoder.layers.0.self_attention.linear_proj.weight",
        "decoder.layers.0.self_attention.linear_gate.weight",
        "decoder.layers.0.self_attention.gate_norm.weight",
        "decoder.layers.0.pre_mlp_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.linear_fc2.weight",
        "decoder.layers.1.mlp.router.weight",
        "decoder.layers.1.mlp.router.expert_bias",
        "decoder.layers.1.mlp.experts.7.linear_fc1.weight",
        "decoder.layers.1.mlp.experts.7.linear_fc2.weight",
        "decoder.layers.1.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.1.mlp.shared_experts.linear_fc2.weight",
        "mtp.layers.0.enorm.weight",
        "mtp.layers.0.hnorm.weight",
        "mtp.layers.0.eh_proj.weight",
        "mtp.layers.0.final_layernorm.weight",
        "mtp.layers.0.transformer_layer.self_attention.linear_qkv.weight",
        "mtp.layers.0.transformer_layer.mlp.experts.0.linear_fc1.weight",
    } <= names
    assert "decoder.layers.1.self_attention.linear_gate.weight" not in names


def test_expert_biases_alone_are_fp32(tiny: ModelConfig) -> None:
    fp32 = {name for name, entry in make_table(tiny).items() if entry.fp32}
    assert fp32 == {name for name in make_table(tiny) if name.endswith("expert_bias")}
    assert len(fp32) == 4


@settings(max_examples=30, deadline=None)  # imports may fall into the first example
@given(
    groups=st.integers(1, 4),
    queries=st.integers(1, 4),
    channels=st.integers(1, 3),
    is_lightning=st.booleans(),
)
def test_qkv_rows_regroup_as_the_specification_says(
    groups: int, queries: int, channels: int, is_lightning: bool
) -> None:
    """Rows are labelled (kind, head, channel) and looked up one by one."""
    layer = 0 if is_lightning else 1
    model = dataclasses.replace(
        TINY,
        num_layers=2,
        num_attention_heads=groups * queries,
        num_query_groups=groups,
        kv_channels=channels,
    )
    entry = make_table(model)[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"]
    heads = groups * queries
    if is_lightning:
        groups, queries = heads, 1
    megatron = []
    for group in range(groups):
        for query in range(queries):
            megatron += [("q", group * queries + query, c) for c in range(channels)]
        megatron += [("k", group, c) for c in range(channels)]
        megatron += [("v", group, c) for c in range(channels)]
    sizes = {"q": heads, "k": groups, "v": groups}
    folder = [
        (kind, head, c) for kind in "qkv" for head in range(sizes[kind]) for c in range(channels)
    ]
    rows = torch.arange(len(megatron), dtype=torch.float32)[:, None].expand(-1, entry.shape[1])
    (got,) = entry.to_hf(rows).values()
    assert [megatron[int(row)] for row in got[:, 0]] == folder
    assert torch.equal(entry.from_hf({entry.hf[0]: got}), rows)


def test_every_entry_maps_back_and_keeps_the_norm(tiny: ModelConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    for entry in make_table(tiny).values():
        tensor = torch.randn(entry.shape, generator=generator)
        parts = entry.to_hf(tensor)
        assert {name: tuple(part.shape) for name, part in parts.items()} == dict(
            zip(entry.hf, entry.hf_shapes, strict=True)
        )
        assert torch.equal(entry.from_hf(parts), tensor), entry.logical
        squares = sum(part.square().sum() for part in parts.values())
        torch.testing.assert_close(squares, tensor.square().sum())


def test_gate_rows_come_before_up_rows(tiny: ModelConfig) -> None:
    entry = make_table(tiny)["decoder.layers.0.mlp.linear_fc1.weight"]
    rows = torch.arange(entry.shape[0])[:, None].expand(entry.shape)
    parts = entry.to_hf(rows)
    assert list(parts) == [
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
    ]
    half = tiny.ffn_hidden_size
    assert parts["model.layers.0.mlp.up_proj.weight"][0, 0] == half


def test_mtp_layers_follow_the_trunk(tiny: ModelConfig) -> None:
    tiny.mtp_num_layers = 2
    table = make_table(tiny)
    assert table["mtp.layers.1.eh_proj.weight"].hf == ("model.layers.5.eh_proj.weight",)
    assert table["mtp.layers.1.transformer_layer.mlp.router.weight"].hf == (
        "model.layers.5.mlp.gate.weight",
    )
