import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ring_train.config import DecayLayerRule
from ring_train.hf import reader
from ring_train.hf.config import read_model_config
from ring_train.hf.errors import HfError
from ring_train.hf.reader import open_hf_folder
from tests.unit.hf.conftest import GOLDEN

GoldenCopy = Callable[[str], Path]
INDEX = "model.safetensors.index.json"
FIRST_SHARD = "model-00001-of-00002.safetensors"


def refuse(folder: Path, match: str) -> None:
    """The folder is refused before a tensor is read."""
    rule = DecayLayerRule.shifted if "ring" in folder.name else None
    model = read_model_config(folder, rule)
    with pytest.raises(HfError, match=match), open_hf_folder(folder, model):
        pytest.fail("a damaged folder was opened")


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite model.safetensors after `change` edited its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_index(folder: Path, **places: Any) -> None:
    """Set the shards of tensors whose dots are written as underscores of two."""
    path = folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"].update({name.replace("__", "."): place for name, place in places.items()})
    path.write_text(json.dumps(index))


def test_tensors_come_under_the_trainers_names() -> None:
    folder = GOLDEN / "ring_linear_v2"
    model = read_model_config(folder, DecayLayerRule.shifted)
    stored = {
        **load_file(folder / FIRST_SHARD),
        **load_file(folder / FIRST_SHARD.replace("1", "2", 1)),
    }
    with open_hf_folder(folder, model) as reader:
        gate_up = reader.read_logical(
            "mtp.layers.0.transformer_layer.mlp.experts.3.linear_fc1.weight"
        )
        embedding = reader.read_logical("embedding.word_embeddings.weight")
    prefix = "model.layers.4.mlp.experts.3."
    parts = [stored[f"{prefix}{name}_proj.weight"] for name in ("gate", "up")]
    assert torch.equal(gate_up, torch.cat(parts))
    assert torch.equal(embedding, stored["model.word_embeddings.weight"])


def test_expert_bias_comes_as_fp32_from_a_bf16_folder(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")

    def to_bf16(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    change_tensors(folder, to_bf16)
    with open_hf_folder(folder, read_model_config(folder)) as reader:
        assert reader.read_logical("decoder.layers.1.mlp.router.expert_bias").dtype == torch.float32
        assert reader.read_logical("decoder.layers.1.mlp.router.weight").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"num_hidden_layers": 60_000}, r"num_hidden_layers=60000, .* but there are \d+; export"),
        ({"num_experts": 10**8}, r"num_experts=100000000 need more than \d+ tensors"),
        ({"num_nextn_predict_layers": 10**9}, "num_nextn_predict_layers=1000000000 and"),
        ({"num_attention_heads": 2**16}, "num_attention_heads=65536, but no tensor is so wide"),
    ],
)
def test_sizes_that_the_folder_is_far_from_are_refused_without_a_table(
    golden_copy: GoldenCopy,
    values: dict[str, int],
    match: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = golden_copy("ling_v2")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    monkeypatch.setattr(reader, "make_table", lambda model: pytest.fail("a table was made"))
    refuse(folder, match)


def test_a_missing_tensor_is_named(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.gate.expert_bias"))
    refuse(folder, r"1 tensors missing: model\.layers\.1\.mlp\.gate\.expert_bias")


def test_an_extra_tensor_is_named(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")
    change_tensors(folder, lambda tensors: tensors.update(slope=torch.zeros(4)))
    refuse(folder, "1 tensors extra: slope")


def test_a_misshapen_tensor_is_named_with_both_shapes(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64)}))
    refuse(folder, r"1 tensors misshapen: model\.norm\.weight \[64\] not \[128\]")


def test_integer_weights_are_refused(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")
    weight = torch.ones(128, dtype=torch.int8)
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": weight}))
    refuse(folder, r"1 tensors of unread dtype: model\.norm\.weight I8")


def test_many_problems_are_counted(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "num_nextn_predict_layers": 0}))
    refuse(folder, r"39 tensors extra: .* and 34 more")


def test_a_shard_named_outside_the_folder_is_refused(golden_copy: GoldenCopy) -> None:
    for place in ("../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3):
        folder = golden_copy("ring_linear_v2")
        edit_index(folder, lm_head__weight=place)
        refuse(folder, r"puts lm_head\.weight in .*; shards lie in the folder itself")
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_an_index_with_a_tensor_that_no_shard_holds_is_refused(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ring_linear_v2")
    edit_index(folder, ghost__weight=FIRST_SHARD)
    refuse(folder, r"names 1 tensors that no shard holds, first ghost\.weight")


def test_an_index_that_puts_a_tensor_in_the_wrong_shard_is_refused(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ring_linear_v2")
    edit_index(folder, lm_head__weight=FIRST_SHARD)
    refuse(folder, r"holds lm_head\.weight, but .* says 'model-00001")


def test_a_missing_shard_is_named(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ring_linear_v2")
    (folder / FIRST_SHARD).unlink()
    refuse(folder, f"{FIRST_SHARD} does not exist")


@pytest.mark.parametrize("num_bytes", [0, 4, 1000, 2_000_000, 2_044_063])
def test_a_truncated_shard_is_refused(golden_copy: GoldenCopy, num_bytes: int) -> None:
    folder = golden_copy("ring_linear_v2")
    data = (folder / FIRST_SHARD).read_bytes()
    (folder / FIRST_SHARD).write_bytes(data[:num_bytes])
    refuse(folder, "copy it again")


def test_a_shard_with_a_tail_is_refused(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    refuse(folder, "its header describes")


def test_a_header_that_is_no_table_is_refused(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")
    for header in (b"[]", b"nonsense", b'{"a": 3}', b'{"a": {}}'):
        content = struct.pack("<Q", len(header)) + header
        (folder / "model.safetensors").write_bytes(content)
        refuse(folder, "is not a safetensors file")


def test_a_folder_without_weights_is_refused(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")
    (folder / "model.safetensors").unlink()
    refuse(folder, "holds neither")


def test_a_folder_with_two_sets_of_weights_is_refused(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ring_linear_v2")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    refuse(folder, "holds both")


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": 3}', "{"])
def test_an_unreadable_index_is_refused(golden_copy: GoldenCopy, text: str) -> None:
    folder = golden_copy("ring_linear_v2")
    (folder / INDEX).write_text(text)
    refuse(folder, "copy")


def test_a_tensor_with_nan_is_named_when_it_is_read(golden_copy: GoldenCopy) -> None:
    folder = golden_copy("ling_v2")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.experts.1.up_proj.weight"][0, 0] = float("nan")

    change_tensors(folder, spoil)
    match = r"experts\.1\.up_proj\.weight of .*model\.safetensors holds 1 values that are NaN"
    with (
        open_hf_folder(folder, read_model_config(folder)) as reader,
        pytest.raises(HfError, match=match),
    ):
        reader.read_logical("decoder.layers.2.mlp.experts.1.linear_fc1.weight")
