"""YaRN in vLLM against the modeling files in transformers, past the original length."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ring_linear_vllm.engine import build_engine, close_engine, prompt_logprobs
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from tests.serving.folders import MODELING, edit_config, expected, longest_prompt
from tests.serving.test_golden import ABSOLUTE, largest_difference

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
MOVED = 1e-2
"""YaRN moves some log-probability by at least this much."""


@torch.no_grad()
def transformers_logprobs(folder: Path, prompts: list[list[int]]) -> list[list[float]]:
    """By config class and model of the folder; AutoConfig would give that of the plugin."""
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    config = get_class_from_dynamic_module(auto_map["AutoConfig"], folder).from_pretrained(folder)
    model = get_class_from_dynamic_module(auto_map["AutoModelForCausalLM"], folder).from_pretrained(
        folder, config=config, dtype="float32"
    )
    rows = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logprobs = model(ids).logits[0, :-1].log_softmax(-1)
        rows.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return rows


@pytest.mark.parametrize(("name", "family"), [("zero_based", "linear_v2"), ("softmax", "v2")])
def test_yarn_equals_transformers(
    folders: dict[str, Path], tmp_path: Path, name: str, family: str
) -> None:
    folder = Path(shutil.copytree(folders[name], tmp_path / "yarn"))
    for path in MODELING.glob("*_v2.py"):
        shutil.copy(path, folder)
    word = "LinearV2" if family == "linear_v2" else "V2"
    auto_map = {
        "AutoConfig": f"configuration_bailing_moe_{family}.BailingMoe{word}Config",
        "AutoModelForCausalLM": f"modeling_bailing_moe_{family}.BailingMoe{word}ForCausalLM",
    }
    edit_config(folder, rope_scaling=YARN, max_position_embeddings=256, auto_map=auto_map)
    golden = expected(name)
    wanted = transformers_logprobs(folder, golden["prompts"])
    engine = build_engine(str(folder), max_tokens=longest_prompt() + 1, trust_remote_code=True)
    try:
        got = prompt_logprobs(engine, golden["prompts"])
    finally:
        close_engine(engine)
    assert largest_difference(got, wanted) < ABSOLUTE
    assert largest_difference(got, golden["logprobs"]) > MOVED
