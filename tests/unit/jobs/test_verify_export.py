import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ring_train.errors import UserError
from ring_train.hf.config import read_model_config
from ring_train.jobs.verify_export import check_mtp

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "ling_v2"


def test_a_folder_without_mtp_layers_names_the_way_out(tmp_path: Path) -> None:
    model = read_model_config(GOLDEN)
    check_mtp(GOLDEN, model)
    folder = shutil.copytree(GOLDEN, tmp_path / "x", copy_function=shutil.copyfile)
    config = json.loads((folder / "config.json").read_text())
    config["num_nextn_predict_layers"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    check_mtp(folder, model)  # tensors without their key are for the certificate to name
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    first_mtp = f"model.layers.{model.num_layers}."
    trunk = {name: tensor for name, tensor in tensors.items() if not name.startswith(first_mtp)}
    save_file(trunk, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="add mtp=none if they were left out on purpose"):
        check_mtp(folder, model)
