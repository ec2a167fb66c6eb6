"""Conversions of golden folders: what changes, what keeps its bytes, and what is refused."""

import dataclasses
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from ring_train.config import (
    Architecture,
    ConvertConfig,
    DecayLayerRule,
    ModelConfig,
    MtpExport,
    NewGates,
    NewRows,
    WeightFormat,
    compose,
)
from ring_train.hf.config import read_model_config
from ring_train.hf.conversion import convert_folder, make_conversion
from ring_train.hf.errors import HfError
from ring_train.hf.layer_pattern import expand_key_values, layer_pattern_problems, pool_key_values
from ring_train.hf.reader import open_hf_folder
from ring_train.hf.shards import read_stored
from ring_train.hf.table import _qkv_head_order, make_table
from ring_train.hf.vocabulary import VocabularyChange, change_rows
from ring_train.hf.writer import HfFormat, write_hf_folder
from tests.unit.hf.conftest import GOLDEN
from tests.unit.hf.test_memory import (
    ALLOCATOR_BYTES,
    MODEL,
    NUM_TENSORS,
    resident_bytes,
    start_high_water,
)

LING, RING = GOLDEN / "ling_v2", GOLDEN / "ring_linear_v2"
HEADS, GROUPS, CHANNELS, WIDTH = 6, 2, 4, 5
NEW = ("g_proj.weight", "g_norm.weight")
FP64_ROUNDING = 1e-12
"""Sums of hundreds of fp64 terms of order one."""


def convert(source: Path, output: Path, **values: Any) -> Path:
    config = ConvertConfig(hf_dir=str(source), output=str(output), **values)
    convert_folder(make_conversion(config), config)
    return output


def weights(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden Ling folder, every second layer lightning."""
    output = tmp_path_factory.mktemp("converted") / "linear"
    return convert(LING, output, layer_group_size=2, group_norm_size=2)


def in_folder_order(qkv: Tensor, num_groups: int) -> list[Tensor]:
    """Return (queries, keys, values), each [heads, d, h], of the trainer's fused projection."""
    order = torch.tensor(_qkv_head_order(HEADS, num_groups))
    heads = qkv.unflatten(0, (-1, CHANNELS))[order]
    return list(heads.split([HEADS, num_groups, num_groups]))


def test_head_j_gets_the_key_and_value_of_its_group() -> None:
    qkv = torch.randn((HEADS + 2 * GROUPS) * CHANNELS, WIDTH)
    query, key, value = in_folder_order(qkv, GROUPS)
    wide_query, wide_key, wide_value = in_folder_order(
        expand_key_values(qkv, GROUPS, CHANNELS), HEADS
    )
    assert torch.equal(wide_query, query)
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        assert torch.equal(wide_key[head], key[group])
        assert torch.equal(wide_value[head], value[group])


def test_pooled_heads_are_means_of_their_group() -> None:
    qkv = torch.randn(3 * HEADS * CHANNELS, WIDTH, dtype=torch.float64)
    query, key, value = in_folder_order(qkv, HEADS)
    narrow_query, narrow_key, narrow_value = in_folder_order(
        pool_key_values(qkv, GROUPS, CHANNELS), GROUPS
    )
    assert torch.equal(narrow_query, query)
    torch.testing.assert_close(narrow_key, key.unflatten(0, (GROUPS, -1)).mean(1))
    torch.testing.assert_close(narrow_value, value.unflatten(0, (GROUPS, -1)).mean(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_what_was_expanded_gives_the_same_bits(dtype: torch.dtype) -> None:
    """Three equal heads: their sum in the dtype itself would round."""
    qkv = torch.randn((HEADS + 2 * GROUPS) * CHANNELS, WIDTH).to(dtype)
    wide = expand_key_values(qkv, GROUPS, CHANNELS)
    assert torch.equal(pool_key_values(wide, GROUPS, CHANNELS), qkv)


def test_only_the_attention_of_new_lightning_layers_changes(linear: Path) -> None:
    before, after = weights(LING), weights(linear)
    qkv = [f"model.layers.{layer}.attention.query_key_value.weight" for layer in (0, 2)]
    new = {f"model.layers.{layer}.attention.{name}" for layer in (0, 2) for name in NEW}
    assert after.keys() == before.keys() | new
    changed = {name for name in before if not is_same(before[name], after[name])}
    assert changed == set(qkv)
    for name in qkv:
        query, key, value = before[name].split([128, 64, 64])
        wide = [x.unflatten(0, (2, 32)).repeat_interleave(2, 0).flatten(0, 1) for x in (key, value)]
        assert torch.equal(after[name], torch.cat([query, *wide]))
    for name in new:
        assert torch.all(after[name] == (1.0 if "g_norm" in name else 0.0))


def test_the_config_says_what_the_model_has_become(linear: Path) -> None:
    before, after = read_model_config(LING), read_model_config(linear)
    assert after.architecture is Architecture.bailing_moe_linear_v2
    assert (after.layer_group_size, after.group_norm_size) == (2, 2)
    assert after.decay_layer_rule is DecayLayerRule.zero_based
    for name in ("rotary_base", "max_position_embeddings", "vocab_size", "mtp_num_layers"):
        assert getattr(after, name) == getattr(before, name)


def test_there_and_back_gives_the_same_folder(linear: Path, tmp_path: Path) -> None:
    again = convert(linear, tmp_path / "again", layer_group_size=1)
    before, after = weights(LING), weights(again)
    assert after.keys() == before.keys()
    assert all(is_same(before[name], after[name]) for name in before)
    assert read_model_config(again) == read_model_config(LING)


def test_drawn_gates_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    drawn = {"new_gates": NewGates.normal, "group_norm_size": 1}
    four = weights(convert(LING, tmp_path / "four", layer_group_size=4, **drawn))
    two = weights(convert(LING, tmp_path / "two", layer_group_size=2, **drawn))
    other = weights(convert(LING, tmp_path / "other", layer_group_size=2, seed=1, **drawn))
    gates = [f"model.layers.{layer}.attention.g_proj.weight" for layer in (0, 2)]
    for name in gates:
        assert torch.equal(four[name], two[name])
        assert not torch.equal(other[name], two[name])
        std = read_model_config(LING).init_method_std
        assert float(two[name].std()) == pytest.approx(std, rel=0.05)
    assert not torch.equal(two[gates[0]], two[gates[1]])


def test_a_hybrid_gets_more_lightning_layers_under_its_own_rule(tmp_path: Path) -> None:
    rule = DecayLayerRule.shifted
    output = convert(RING, tmp_path / "out", layer_group_size=4, decay_layer_rule=rule)
    model = read_model_config(output)
    assert (model.decay_layer_rule, model.group_norm_size) == (rule, 2)
    before, after = weights(RING), weights(output)
    assert after.keys() - before.keys() == {f"model.layers.1.attention.{name}" for name in NEW}
    assert torch.equal(
        after["model.layers.0.attention.g_proj.weight"],
        before["model.layers.0.attention.g_proj.weight"],
    )


def test_written_precision_is_that_of_the_folder(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"layer_group_size": 2, "group_norm_size": 2}
    half = convert(LING, tmp_path / "half", precision=WeightFormat.bf16, **arguments)
    again = weights(convert(half, tmp_path / "again", layer_group_size=4))
    biases = {name for name in again if name.endswith("expert_bias")}
    assert {again[name].dtype for name in biases} == {torch.float32}
    assert {again[name].dtype for name in again.keys() - biases} == {torch.bfloat16}


def test_values_of_block_fp8_stay(tmp_path: Path) -> None:
    """A block may get another power of two as its scale, which stands for the same values."""
    fp8 = convert(LING, tmp_path / "fp8", precision=WeightFormat.fp8, vocab_size=640)
    again = convert(fp8, tmp_path / "again", layer_group_size=4, group_norm_size=2)
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in weights(again).values())
    models = [read_model_config(folder) for folder in (fp8, again)]
    with open_hf_folder(fp8, models[0]) as before, open_hf_folder(again, models[1]) as after:
        kept = [name for name in before.table if not re.search(r"[012]\.self_att.*qkv", name)]
        assert len(kept) == len(before.table) - 3
        for name in kept:
            assert torch.equal(before.read_logical(name), after.read_logical(name)), name


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            {"layer_group_size": 3, "group_norm_size": 2},
            r"does not divide num_hidden_layers=4; .*1",
        ),
        ({"layer_group_size": 0, "group_norm_size": 2}, "layer_group_size=0 does not divide"),
        ({"layer_group_size": 2}, r"group_norm_size=None does not divide .*=4, .* \[1, 2, 4\]"),
        ({"layer_group_size": 2, "group_norm_size": 3}, "group_norm_size=3 does not divide"),
        ({"group_norm_size": 2}, "group_norm_size=2, but all layers will be softmax"),
        ({"decay_layer_rule": DecayLayerRule.shifted, "vocab_size": 640}, "no lightning layers"),
        ({}, "is already what is asked for"),
        ({"vocab_size": 511}, "vocab_size=511 has no row for token id 511 of"),
        ({"vocab_multiple": 0}, "vocab_multiple=0 must be at least 1"),
        ({"vocab_size": 0}, "vocab_size=0 and .* must be at least 1"),
    ],
)
def test_a_wrong_wish_is_refused(values: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(HfError, match=match):
        convert(LING, tmp_path / "out", **values)
    assert list(tmp_path.iterdir()) == []


def test_a_norm_that_was_trained_keeps_its_groups(tmp_path: Path) -> None:
    with pytest.raises(HfError, match="lightning layers of the folder were trained with 2"):
        convert(
            RING,
            tmp_path / "out",
            layer_group_size=4,
            group_norm_size=4,
            decay_layer_rule=DecayLayerRule.zero_based,
        )


def test_a_pattern_that_mixes_directions_is_refused(tiny: ModelConfig) -> None:
    twelve = dataclasses.replace(tiny, num_layers=12, layer_group_size=4)
    assert "neither a multiple nor a divisor of 4" in layer_pattern_problems(twelve, 6)[0]
    assert not layer_pattern_problems(twelve, 12)
    assert not layer_pattern_problems(twelve, 2)
    silu = dataclasses.replace(twelve, linear_silu=True)
    assert "softmax layers have no SiLU" in layer_pattern_problems(silu, 2)[0]
    first = dataclasses.replace(twelve, architecture=Architecture.bailing_moe, layer_group_size=1)
    assert "has no QK-norm" in layer_pattern_problems(first, 4)[0]


def test_a_damaged_source_leaves_nothing(
    golden_copy: Callable[[str], Path], tmp_path: Path
) -> None:
    source = golden_copy("ling_v2")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(HfError, match=r"model\.safetensors has \d+ bytes"):
        convert(source, tmp_path / "out", layer_group_size=2, group_norm_size=2)
    assert not (tmp_path / "out").exists()


def more_ids(folder: Path, *tokens: str) -> Path:
    """Return a copy of a tokenizer's folder with more tokens."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(LING / name, folder / name)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(list(tokens))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_padding_rows_come_and_go(tmp_path: Path) -> None:
    grown = convert(LING, tmp_path / "grown", vocab_size=513, vocab_multiple=128)
    before, after = weights(LING), weights(grown)
    assert read_model_config(grown).vocab_size == 640
    for name in before:
        if name in ("model.word_embeddings.weight", "lm_head.weight"):
            assert torch.equal(after[name][:512], before[name])
            mean = before[name].double().mean(0)
            error = (after[name][512:].double() - mean).abs().max()
            assert float(error) < torch.finfo(torch.float32).eps
        else:
            assert is_same(before[name], after[name])
    shrunk = weights(convert(grown, tmp_path / "shrunk", vocab_size=512))
    assert all(is_same(before[name], shrunk[name]) for name in before)


def test_new_ids_take_rows_of_padding(tmp_path: Path) -> None:
    tokenizer = more_ids(tmp_path / "tokenizer", "<one>", "<two>")
    grown = convert(LING, tmp_path / "grown", vocab_size=640)
    output = convert(grown, tmp_path / "out", tokenizer=str(tokenizer), new_rows=NewRows.normal)
    before, after = weights(grown), weights(output)
    for name in ("model.word_embeddings.weight", "lm_head.weight"):
        changed = (before[name] != after[name]).any(1).nonzero().flatten().tolist()
        assert changed == [512, 513]
    assert "<two>" in Tokenizer.from_file(str(output / "tokenizer.json")).get_vocab()


def test_a_tokenizer_that_moves_ids_is_refused(tmp_path: Path) -> None:
    more = more_ids(tmp_path / "more", "<one>")
    grown = convert(LING, tmp_path / "grown", vocab_size=640, tokenizer=str(more))
    with pytest.raises(HfError, match=r"1 tokens of .* another id or none, first '<one>': 512 bec"):
        convert(grown, tmp_path / "out", tokenizer=str(LING))
    other = more_ids(tmp_path / "other", "<two>")
    with pytest.raises(HfError, match="give a tokenizer that only adds tokens"):
        convert(grown, tmp_path / "out", tokenizer=str(other))


def test_no_old_token_loses_more_than_its_share() -> None:
    """Hewitt 2021: log(1 + k/n) for k new rows that are the mean of n old ones."""
    generator = torch.Generator().manual_seed(0)
    old, padding, new = 100, 20, 40
    rows = torch.randn(old + padding, 16, generator=generator, dtype=torch.float64)
    rows[old:] += 3  # nothing has ever trained these
    change = VocabularyChange(
        old_rows=old + padding, new_rows=old + padding + new, old_ids=old, new_ids=old
    )
    hidden = 0.3 * torch.rand(50, 16, generator=generator, dtype=torch.float64)
    before = (hidden @ rows.T).log_softmax(1)
    changed = change_rows(rows, change, None)
    torch.testing.assert_close(changed[-new:], rows[:old].mean(0).expand(new, 16))
    after = (hidden @ changed.T).log_softmax(1)
    lost = (before - after[:, : old + padding])[:, :old]
    assert float(lost.max()) <= math.log(1 + new / old) + FP64_ROUNDING
    assert float(lost.min()) > 0


def test_rows_drawn_around_the_mean_have_the_spread_of_old_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.1, 1.0, 10.0])
    rows = 5 + spread * torch.randn(4000, 3, generator=generator)
    change = VocabularyChange(old_rows=4000, new_rows=8000, old_ids=4000, new_ids=8000)
    new = change_rows(rows, change, torch.Generator().manual_seed(1))[4000:]
    torch.testing.assert_close(new.std(0), spread, rtol=0.05, atol=0)
    torch.testing.assert_close(new.mean(0), rows.mean(0), rtol=0.1, atol=0.01)


def test_a_normalised_head_keeps_its_vocabulary(
    golden_copy: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(HfError, match="norm_head=true divides lm_head"):
        convert(GOLDEN / "ring_lite_v1", tmp_path / "out", vocab_size=640)


def test_memory_of_a_conversion_is_that_of_a_few_tensors(tmp_path: Path) -> None:
    softmax = ["model.architecture=bailing_moe_v2", "model.layer_group_size=1"]
    model = compose("pretrain", [*MODEL, *softmax]).model
    shapes = {name: entry.shape for name, entry in make_table(model).items()}
    write_hf_folder(
        tmp_path / "softmax",
        model,
        lambda name: torch.full(shapes[name], 0.5),
        form=HfFormat(weights=WeightFormat.fp32),
        tokenizer_dir=LING,
    )
    sizes = [4 * torch.Size(shape).numel() for shape in shapes.values()]
    bound = NUM_TENSORS * max(sizes) + ALLOCATOR_BYTES
    assert sum(sizes) > 4 * bound  # a model that would show
    before = start_high_water()
    pattern = {"layer_group_size": 2, "group_norm_size": 2, "vocab_size": 640}
    convert(tmp_path / "softmax", tmp_path / "out", **pattern)
    grown = resident_bytes("VmHWM") - before
    assert grown < bound, f"{grown} of {sum(sizes)} bytes"


def test_mtp_layers_stay_where_they_are(tmp_path: Path) -> None:
    apart = tmp_path / "apart"
    model = read_model_config(LING)
    with open_hf_folder(LING, model) as reader:
        form = HfFormat(weights=WeightFormat.fp32, mtp=MtpExport.separate)
        write_hf_folder(apart, model, reader.read_logical, form=form, tokenizer_dir=LING)
    converted = convert(apart, tmp_path / "out", layer_group_size=2, group_norm_size=2)
    assert (converted / "mtp" / "config.json").is_file()
    assert read_model_config(converted).mtp_num_layers == 1
    trunk = read_stored(converted)
    assert not [name for name in trunk if name.startswith("model.layers.4.")]
