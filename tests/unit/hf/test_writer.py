import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ring_train.config import ModelConfig, WeightFormat, compose
from ring_train.hf import writer
from ring_train.hf.errors import HfError
from ring_train.hf.reader import open_hf_folder
from ring_train.hf.table import make_table
from ring_train.hf.writer import HfFormat, write_hf_folder
from tests.unit.hf.conftest import GOLDEN, RULES

Read = Callable[[str], Tensor]
TOKENIZER = GOLDEN / "ling_v2"


def weights(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def make_tensors(model: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(entry.shape, generator=generator)
        for name, entry in make_table(model).items()
    }


def write(output: Path, model: ModelConfig, read: Read | None = None, **changes: Any) -> None:
    """Write the folder of random tensors; `changes` are fields of its format or a tokenizer."""
    tokenizer_dir = changes.pop("tokenizer_dir", TOKENIZER)
    form = dataclasses.replace(HfFormat(weights=WeightFormat.bf16), **changes)
    read = read or make_tensors(model).__getitem__
    write_hf_folder(output, model, read, form=form, tokenizer_dir=tokenizer_dir)


def assert_refused(output: Path, model: ModelConfig, match: str, **arguments: Any) -> None:
    """Nothing is left behind by a refusal, and nothing else is touched."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(HfError, match=match):
        write(output, model, **arguments)
    assert sorted(output.parent.rglob("*")) == before


@pytest.mark.parametrize("name", RULES)
def test_a_folder_written_again_holds_the_same_bytes(exported: dict[str, Path], name: str) -> None:
    wanted, got = weights(GOLDEN / name), weights(exported[name])
    assert got.keys() == wanted.keys()
    for tensor_name, tensor in wanted.items():
        assert got[tensor_name].dtype == tensor.dtype, tensor_name
        assert got[tensor_name].numpy().tobytes() == tensor.numpy().tobytes(), tensor_name


@pytest.mark.parametrize("name", RULES)
def test_a_config_written_again_is_the_same(exported: dict[str, Path], name: str) -> None:
    """All keys and values, and whether a number is written as a whole one."""
    old = json.loads((GOLDEN / name / "config.json").read_text())
    new = json.loads((exported[name] / "config.json").read_text())
    del old["transformers_version"]
    assert new.pop("auto_map")["AutoConfig"].startswith("configuration_bailing_moe")
    rule = RULES[name]
    assert new.pop("decay_layer_rule", None) == (None if rule is None else rule.value)
    assert json.dumps(new, sort_keys=True) == json.dumps(old, sort_keys=True)


def test_an_export_has_all_its_files(exported: dict[str, Path]) -> None:
    common = {
        *("config.json", "generation_config.json", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("chat_template.jinja", "configuration_bailing_moe_v2.py", "modeling_bailing_moe_v2.py"),
    }
    linear = {"configuration_bailing_moe_linear_v2.py", "modeling_bailing_moe_linear_v2.py"}
    first = {"configuration_bailing_moe.py", "modeling_bailing_moe.py"}
    for name, expected in (
        ("ling_v2", common),
        ("ring_linear_v2", common | linear),
        ("ring_lite_v1", common | first),
    ):
        names = {path.name for path in exported[name].iterdir()}
        shards = {found for found in names if found.endswith(".safetensors")}
        assert names - shards == expected
        assert shards == {f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, 5)}


def test_shards_stay_below_their_limit_and_the_index_sums_them(exported: dict[str, Path]) -> None:
    folder = exported["ring_linear_v2"]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    total = 0
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 1_000_000
        assert all(index["weight_map"][name] == path.name for name in tensors)
        total += size
    assert index["metadata"]["total_size"] == total


def test_bf16_rounds_all_but_expert_biases(tiny: ModelConfig, tmp_path: Path) -> None:
    write(tmp_path / "out", tiny)
    with open_hf_folder(tmp_path / "out", tiny) as reader:
        for name, tensor in make_tensors(tiny).items():
            wanted = tensor if name.endswith("expert_bias") else tensor.bfloat16()
            got = reader.read_logical(name)
            assert got.dtype == wanted.dtype
            assert torch.equal(got, wanted), name


def test_an_empty_output_folder_is_used(tiny: ModelConfig, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "out"
    output.mkdir(parents=True)
    write(output, tiny)
    assert (output / "config.json").exists()
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_a_full_output_folder_is_left_alone(tiny: ModelConfig, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("precious")
    assert_refused(output, tiny, "is not empty")
    assert (output / "mine.txt").read_text() == "precious"


def test_a_file_in_the_place_of_the_output_is_left_alone(tiny: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    assert_refused(tmp_path / "out", tiny, "is not a folder")


def test_a_misshapen_tensor_is_named(tiny: ModelConfig, tmp_path: Path) -> None:
    tensors = make_tensors(tiny)
    tensors["embedding.word_embeddings.weight"] = torch.zeros(511, 64)
    match = r"word_embeddings\.weight has shape \[511, 64\], the config says \[512, 64\]"
    assert_refused(tmp_path / "out", tiny, match, read=tensors.__getitem__)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_tensor_with_nan_or_infinity_is_named(
    tiny: ModelConfig, tmp_path: Path, value: float
) -> None:
    tensors = make_tensors(tiny)
    tensors["output_layer.weight"][3, 4] = value
    match = r"output_layer\.weight holds 1 values that are NaN or infinite"
    assert_refused(tmp_path / "out", tiny, match, read=tensors.__getitem__)


def test_a_failure_while_tensors_come_leaves_nothing(tiny: ModelConfig, tmp_path: Path) -> None:
    names = iter(range(1000))

    def breaking(name: str) -> Tensor:
        if next(names) == 40:
            raise RuntimeError("a disk died")
        return make_tensors(tiny)[name]

    with pytest.raises(RuntimeError, match="a disk died"):
        write(tmp_path / "out", tiny, breaking, max_shard_bytes=10_000)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_reads_back_otherwise_is_not_delivered(
    tiny: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_config = writer.hf_config_dict

    def lying(model: ModelConfig, *, weights: WeightFormat) -> dict[str, object]:
        return {**true_config(model, weights=weights), "decay_layer_rule": "shifted"}

    monkeypatch.setattr(writer, "hf_config_dict", lying)
    assert_refused(tmp_path / "out", tiny, "model.decay_layer_rule=.*zero_based.*reads back")


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    model = compose("pretrain", ["model=tiny", "model.vocab_size=256"]).model
    assert_refused(tmp_path / "out", model, "has token id 511, but model.vocab_size=256")


def test_a_folder_without_a_tokenizer_is_refused(tiny: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    match = "lacks tokenizer.json, tokenizer_config.json"
    assert_refused(tmp_path / "out", tiny, match, tokenizer_dir=tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[1]", "holds no object"),
        ("tokenizer.json", "{", "is no tokenizer"),
    ],
)
def test_a_damaged_tokenizer_is_refused_before_weights_are_read(
    tiny: ModelConfig, tmp_path: Path, name: str, content: str, match: str
) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, folder)
    for path in (folder, folder / name):
        path.chmod(0o755)
    (folder / name).write_text(content)

    def read(name: str) -> Tensor:
        pytest.fail(f"{name} was read")

    assert_refused(tmp_path / "out", tiny, f"{name} {match}", tokenizer_dir=folder, read=read)


@pytest.mark.parametrize("limit", [0, -5])
def test_files_of_no_size_are_refused(tiny: ModelConfig, tmp_path: Path, limit: int) -> None:
    assert_refused(tmp_path / "out", tiny, f"max_shard_bytes={limit}", max_shard_bytes=limit)


def test_who_may_read_the_config_may_read_the_weights(exported: dict[str, Path]) -> None:
    """A server often runs as another user; safetensors writes for the owner alone."""
    folder = exported["ling_v2"]
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {(folder / "config.json").stat().st_mode & 0o777}
