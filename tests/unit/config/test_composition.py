"""Words and YAML become typed nodes, or one message that names the key and the nearest one."""

import re
import shutil
from pathlib import Path

import pytest

from ring_train.config import (
    Config,
    ConfigError,
    DecayLayerRule,
    DomainConfig,
    Precision,
    compose,
    read_yaml,
    to_yaml,
)
from ring_train.config.composition import CONF_DIR, presets


def test_words_become_typed_values() -> None:
    words = ["model=tiny", "train.precision=bf16", "model.decay_layer_rule=shifted", "seed=7"]
    config = compose("pretrain", words)
    assert type(config) is Config
    assert config.train.precision is Precision.bf16
    assert config.model.decay_layer_rule is DecayLayerRule.shifted
    assert (config.model.hidden_size, config.seed) == (64, 7)


def test_later_words_win() -> None:
    config = compose("pretrain", ["model=tiny", "model=small", "model.hidden_size=96"])
    assert (config.model.num_layers, config.model.hidden_size) == (8, 96)


def test_a_preset_inherits_what_it_does_not_say() -> None:
    ring = compose("pretrain", ["model=ring_mini_linear_2_0"]).model
    ling = compose("pretrain", ["model=ling_mini_2_0"]).model
    assert ring.layer_group_size == 5
    assert ling.layer_group_size == 1
    assert ring.moe_ffn_hidden_size == ling.moe_ffn_hidden_size == 512


def test_free_dicts_take_new_keys_without_ceremony() -> None:
    words = [
        "model=tiny",
        "model.megatron.deterministic_mode=true",
        "data.domains.code.path=a",
        "data.domains.code.weight=2",
        "data.domains={prose: {path: b}}",
    ]
    config = compose("pretrain", words)
    assert config.model.megatron == {"deterministic_mode": True}
    assert config.data.domains == {
        "code": DomainConfig(path="a", weight=2.0),
        "prose": DomainConfig(path="b"),
    }


def test_an_experiment_chooses_presets_and_words_still_win() -> None:
    config = compose("pretrain", ["experiment=demo", "train.num_steps=3"])
    assert config.run_dir == "runs/demo"
    assert sorted(config.data.domains) == ["code", "math", "prose"]
    assert config.parallel.expert_model_parallel_size == 2
    assert config.train.num_steps == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.hiden_size=3"], "model.hiden_size is not a key; did you mean model.hidden_size?"),
        (["hidden_size=3"], "hidden_size is not a key; did you mean model.hidden_size?"),
        (["modle=tiny"], "modle is not a key; did you mean model?"),
        (
            ["parallel.tensor_parallel_size=2"],
            "parallel.tensor_parallel_size is not a key; "
            "did you mean parallel.tensor_model_parallel_size?",
        ),
        (
            ["data.domains.code.wieght=2"],
            "data.domains.code.wieght is not a key; did you mean data.domains.code.weight?",
        ),
        (["+model.hiden_size=3"], "did you mean model.hidden_size?"),
        (["model.hidden_size.x=3"], "model.hidden_size.x is not a key"),
        (["checkpoint.zzz=3"], "choose from checkpoint.async_save, checkpoint.interval_steps"),
        (["model.hidden_size=wide"], "model.hidden_size: Value 'wide'"),
        (["model.hidden_size=1.5"], "model.hidden_size: Value '1.5'"),
        (["model.hidden_size=null"], "model.hidden_size: field 'model.hidden_size' is not"),
        (["model.decay_layer_rule=one_based"], "expected one of [zero_based, shifted]"),
        (["data.domains.code.weight=2"], "data.domains.code.path: no value given"),
        (["data.domains.code.weight=heavy"], "data.domains.code.weight: Value 'heavy'"),
        (["parallel=tp3"], "parallel=tp3 is not a preset; did you mean tp2?; choose from"),
        (["experiment=nope"], "experiment=nope is not a preset"),
        (["--verbose"], "'--verbose' is not key=value"),
    ],
)
def test_a_wrong_word_is_named_with_the_way_out(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose("pretrain", ["model=tiny", *words])


def test_an_unknown_model_lists_the_presets() -> None:
    with pytest.raises(ConfigError, match="did you mean tiny") as caught:
        compose("pretrain", ["model=tinny"])
    for name in presets("model"):
        assert name in str(caught.value)


def test_no_model_at_all_lists_the_presets() -> None:
    with pytest.raises(ConfigError, match="model=PRESET is missing; choose from ling_1t"):
        compose("pretrain", [])


def test_unknown_words_are_reported_together() -> None:
    with pytest.raises(ConfigError, match="hidden_size") as caught:
        compose("pretrain", ["model=tiny", "model.hiden_size=3", "trian.num_steps=3"])
    assert len(str(caught.value).splitlines()) == 2


def test_a_missing_value_of_a_command_is_named() -> None:
    with pytest.raises(ConfigError, match="output, prompts: no value given; add output="):
        compose("score", ["hf_dir=x"])


def test_unknown_keys_in_yaml_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF_DIR, conf)
    (conf / "model" / "mine.yaml").write_text("defaults:\n  - tiny\n  - _self_\n\nhiden_size: 3\n")
    monkeypatch.setattr("ring_train.config.composition.CONF_DIR", conf)
    with pytest.raises(ConfigError, match=r"did you mean model[.]hidden_size"):
        compose("pretrain", ["model=mine"])


def test_yaml_of_a_config_reads_back_equal(tmp_path: Path) -> None:
    config = compose("pretrain", ["experiment=demo", "model.megatron.deterministic_mode=true"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert read_yaml(path) == config


@pytest.mark.parametrize(
    ("seed_line", "message"),
    [
        ("seed: x", "config.yaml: seed: Value 'x'"),
        ("seed: 1\nsede: 1", "config.yaml: sede is not a key; did you mean seed?"),
        ("seed: [", "config.yaml: while parsing"),
    ],
)
def test_a_damaged_run_config_is_one_message(tmp_path: Path, seed_line: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    text = to_yaml(compose("pretrain", ["model=tiny", "seed=1"]))
    path.write_text(text.replace("seed: 1", seed_line))
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_yaml(path)


def test_a_missing_run_config_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_yaml(tmp_path / "config.yaml")
