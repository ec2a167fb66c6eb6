"""Golden folders as exports write them, and what public code says about their prompts."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
MODELING = ROOT / "ring_train" / "hf" / "modeling"
EXPECTED = {
    "zero_based": "ring_linear_v2/expected.json",
    "shifted": "ring_linear_v2/expected_hf_rule.json",
    "softmax": "ling_v2/expected.json",
    "first": "ring_lite_v1/expected.json",
}
"""Folder -> file of prompts and log-probabilities."""


def expected(name: str) -> dict[str, Any]:
    """Return {"prompts", "logprobs", ...} of one of the folders."""
    return json.loads((GOLDEN / EXPECTED[name]).read_text())


def longest_prompt() -> int:
    """Return the tokens of the longest prompt of all folders."""
    return max(len(prompt) for name in EXPECTED for prompt in expected(name)["prompts"])


def make_linear_folder(destination: Path, rule: str) -> Path:
    """Write the hybrid with its MTP layer and the decay rule; no Python files: none is needed."""
    copy_golden("ring_linear_v2", destination)
    edit_config(destination, decay_layer_rule=rule)
    return destination


def make_first_folder(destination: Path) -> Path:
    """Write Ring-lite, of the first generation."""
    copy_golden("ring_lite_v1", destination)
    add_config_class(destination, "configuration_bailing_moe.BailingMoeConfig")
    return destination


def make_softmax_folder(destination: Path) -> Path:
    """Write Ling 2.0 without its MTP layer."""
    copy_golden("ling_v2", destination)
    add_config_class(destination, "configuration_bailing_moe_v2.BailingMoeV2Config")
    config = edit_config(destination, num_nextn_predict_layers=0)
    mtp = f"model.layers.{config['num_hidden_layers']}."
    path = destination / "model.safetensors"
    weights = load_file(path)
    trunk = {name: weight for name, weight in weights.items() if not name.startswith(mtp)}
    assert len(trunk) < len(weights)
    save_file(trunk, path, {"format": "pt"})
    return destination


def add_config_class(folder: Path, name: str) -> None:
    """Add the Python files of config classes, and the name of the one that vLLM is to run."""
    for path in MODELING.glob("configuration_*.py"):
        shutil.copy(path, folder)
    edit_config(folder, auto_map={"AutoConfig": name})


def copy_golden(name: str, destination: Path) -> None:
    """Copy a golden folder into writable files."""
    destination.mkdir()
    for path in (GOLDEN / name).iterdir():
        (destination / path.name).write_bytes(path.read_bytes())


def edit_config(folder: Path, **values: Any) -> dict[str, Any]:
    """Change keys of config.json, or remove those given as Ellipsis; return what it says then."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    config = {key: value for key, value in config.items() if value is not ...}
    path.write_text(json.dumps(config))
    return config
