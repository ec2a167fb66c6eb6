"""MTP layers behind the trunk, in a folder of their own, or left out."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ring_train.config import DecayLayerRule, MtpExport, WeightFormat
from ring_train.hf.config import read_model_config
from ring_train.hf.errors import HfError
from ring_train.hf.reader import open_hf_folder
from ring_train.hf.table import make_table
from ring_train.hf.writer import HfFormat, write_hf_folder
from tests.unit.hf.conftest import GOLDEN, RULES

WITH_MTP = ("ling_v2", "ring_linear_v2")


def export(source: Path, output: Path, mtp: MtpExport, rule: DecayLayerRule | None = None) -> Path:
    model = read_model_config(source, rule)
    with open_hf_folder(source, model) as reader:
        form = HfFormat(weights=WeightFormat.fp32, mtp=mtp)
        write_hf_folder(output, model, reader.read_logical, form=form, tokenizer_dir=source)
    return output


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", WITH_MTP)
def test_a_folder_of_their_own_has_one_layer_and_no_embedding(name: str, tmp_path: Path) -> None:
    folder = export(GOLDEN / name, tmp_path / "out", MtpExport.separate, RULES[name])
    trunk = load_file(folder / "model.safetensors")
    separate = load_file(folder / "mtp" / "model.safetensors")
    assert not [name for name in trunk if name.startswith("model.layers.4.")]
    assert {name.split(".")[2] for name in separate} == {"0"}
    assert "model.layers.0.eh_proj.weight" in separate
    assert config_of(folder)["num_nextn_predict_layers"] == 0
    config = config_of(folder / "mtp")
    assert config["num_nextn_predict_layers"] == config["num_hidden_layers"] == 1
    assert config["first_k_dense_replace"] == 0
    assert config.get("layer_group_size", 1) == 1
    assert (folder / "mtp" / "tokenizer.json").is_file()


@pytest.mark.parametrize("name", WITH_MTP)
def test_both_places_are_the_same_model(name: str, tmp_path: Path) -> None:
    folder = export(GOLDEN / name, tmp_path / "apart", MtpExport.separate, RULES[name])
    behind = export(GOLDEN / name, tmp_path / "behind", MtpExport.layer, RULES[name])
    again = export(folder, tmp_path / "again", MtpExport.layer)
    assert read_model_config(folder).mtp_num_layers == 1
    for path in behind.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name


def test_they_can_be_left_out(tmp_path: Path) -> None:
    folder = export(GOLDEN / "ling_v2", tmp_path / "out", MtpExport.none)
    model = read_model_config(folder)
    assert model.mtp_num_layers == 0
    assert not (folder / "mtp").exists()
    with open_hf_folder(folder, model) as reader:
        assert reader.table.keys() == make_table(model).keys()
        assert not [name for name in reader.table if name.startswith("mtp.")]


def test_a_folder_of_their_own_without_a_depth_is_refused(tmp_path: Path) -> None:
    folder = export(GOLDEN / "ling_v2", tmp_path / "out", MtpExport.separate)
    path = folder / "mtp" / "config.json"
    path.write_text(json.dumps({**config_of(folder / "mtp"), "num_nextn_predict_layers": 0}))
    with pytest.raises(HfError, match="num_nextn_predict_layers=0, but"):
        read_model_config(folder)


def test_layers_in_both_places_are_refused(tmp_path: Path) -> None:
    folder = export(GOLDEN / "ling_v2", tmp_path / "out", MtpExport.layer)
    apart = export(GOLDEN / "ling_v2", tmp_path / "apart", MtpExport.separate)
    (apart / "mtp").rename(folder / "mtp")
    with (
        pytest.raises(HfError, match=r"holds model\.layers\.4\..*remove one"),
        open_hf_folder(folder, read_model_config(folder)),
    ):
        pytest.fail("a folder with two sets of MTP layers was opened")
