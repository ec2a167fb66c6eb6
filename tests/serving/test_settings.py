"""What vLLM is told about the model, and what is refused before any worker starts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ring_linear_vllm.config import ONLY_VALUES, REQUIRED_KEYS
from ring_linear_vllm.model import BailingMoeLinearV2ForCausalLM
from ring_linear_vllm.score import main
from vllm import EngineArgs
from vllm.config import VllmConfig

from tests.serving.folders import edit_config

OTHER_VALUES = {
    key: not only if type(only) is bool else "other" for key, only in ONLY_VALUES.items()
}


def settings_of(folder: Path, **settings: Any) -> VllmConfig:
    return EngineArgs(str(folder), dtype="float32", **settings).create_engine_config()


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """The hybrid under the zero-based rule, to change."""
    return Path(shutil.copytree(folders["zero_based"], tmp_path / "folder"))


def test_the_state_is_fp32_and_prefixes_are_not_cached(folder: Path) -> None:
    config = settings_of(folder, enable_prefix_caching=True)
    assert config.model_config.is_hybrid
    assert config.cache_config.mamba_cache_dtype == "float32"
    assert not config.cache_config.enable_prefix_caching
    dtypes = BailingMoeLinearV2ForCausalLM.get_mamba_state_dtype_from_config(config)
    assert dtypes == (torch.float32,)


def test_nothing_in_the_folder_is_executed(folder: Path) -> None:
    name = "configuration_bailing_moe_linear_v2"
    (folder / f"{name}.py").write_text("raise SystemExit('executed')")
    edit_config(folder, auto_map={"AutoConfig": f"{name}.BailingMoeLinearV2Config"})
    for trust in (False, True):
        assert settings_of(folder, trust_remote_code=trust).model_config.is_hybrid


def test_an_override_completes_the_config(folder: Path) -> None:
    edit_config(folder, decay_layer_rule=...)
    config = settings_of(folder, hf_overrides={"decay_layer_rule": "shifted"})
    assert config.model_config.hf_config.decay_layer_rule == "shifted"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 4}, r"-size 4 does not divide group_norm_size=2.*from \[1, 2\]"),
        ({"mamba_cache_dtype": "bfloat16"}, "--mamba-cache-dtype bfloat16: .*give float32"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "--speculative-config: .*leave it out",
        ),
    ],
)
def test_settings_that_give_other_results_are_refused(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(folder, **settings)


@pytest.mark.parametrize("rule", [..., None, "zero"])
def test_a_missing_or_unknown_decay_rule_is_refused(folder: Path, rule: Any) -> None:
    edit_config(folder, decay_layer_rule=rule)
    with pytest.raises(ValueError, match=r"decay_layer_rule=.*no tensor tells.*--hf-overrides"):
        settings_of(folder)


@pytest.mark.parametrize(
    "values",
    [
        {key: ...}
        for key in REQUIRED_KEYS
        if key not in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_missing_key_is_refused(folder: Path, values: dict[str, Any]) -> None:
    edit_config(folder, **values)
    with pytest.raises(ValueError, match=f"config.json lacks {next(iter(values))}; export"):
        settings_of(folder)


@pytest.mark.parametrize("key", ONLY_VALUES)
def test_what_is_not_implemented_is_refused(folder: Path, key: str) -> None:
    edit_config(folder, **{key: OTHER_VALUES[key]})
    with pytest.raises(ValueError, match=f"{key}=.*but only {key}="):
        settings_of(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_group_size": 3}, "layer_group_size=3 does not divide num_hidden_layers=4"),
        ({"group_norm_size": 3}, "group_norm_size=3 does not divide num_attention_heads=4"),
        ({"linear_rope": False}, "linear_rope=false is not implemented"),
    ],
)
def test_shapes_that_no_engine_agrees_on_are_refused(
    folder: Path, values: dict[str, Any], message: str
) -> None:
    edit_config(folder, **values)
    with pytest.raises(ValueError, match=message):
        settings_of(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"prompts": []}', "no list of prompts"),
        ('{"prompts": [[1]]}', "fewer than two tokens"),
        ('{"prompts": [[1, true]]}', "no token ids"),
        ('{"prompts": [[1, -1]]}', "no token ids"),
    ],
)
def test_bad_prompts_end_the_scorer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(text)
    assert main(["--model", "none", "--prompts", str(prompts), "--output", str(prompts)]) == 1
    assert message in capsys.readouterr().err
    assert prompts.read_text() == text


def test_a_model_that_cannot_be_served_ends_the_scorer(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(folder, decay_layer_rule=...)
    prompts, output = folder / "prompts.json", folder / "scores.json"
    prompts.write_text(json.dumps({"prompts": [[1, 2]]}))
    words = ["--model", str(folder), "--prompts", str(prompts), "--output", str(output)]
    assert main(words) == 1
    assert "decay_layer_rule=None" in capsys.readouterr().err
    assert not output.exists()
