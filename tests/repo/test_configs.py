"""Every shipped YAML file composes and plans; none is dead."""

from pathlib import Path

import pytest
import yaml

from ring_train.config import Config, compose
from ring_train.config.composition import CONF_DIR, ROOTS, groups, presets
from ring_train.jobs.dry_run import main
from ring_train.plan import make_plan, smallest_world

RELEASED = {
    *("ring_flash_linear_2_0", "ring_mini_linear_2_0", "ling_mini_2_0", "ling_flash_2_0"),
    *("ling_1t", "ring_lite"),
}
FIXED_WORLDS = {"ring_flash_linear_512gpu": 512, "ring_mini_linear_16gpu": 16}
NUM_STEPS = 100
FINE_TUNED = {
    **{"demo_sft": "small", "long_cot": "ring_mini_linear_2_0", "ring_lite_sft": "ring_lite"},
    **{"long_cot_staged": "ring_lite", "ring_linear_sft": "ring_mini_linear_2_0"},
    "ling_2_0_sft": "ling_mini_2_0",
}
"""Experiments of `sft`, and a model that each is meant for."""
REQUIRED = {
    "score": ["hf_dir=a", "prompts=b", "output=c"],
    "export": ["checkpoint=a", "output=b"],
    "convert": ["hf_dir=a", "output=b"],
    "evaluate": ["checkpoint=a"],
    "validate": ["weights=[a]"],
    "merge_checkpoints": ["run_dir=a", "output=b"],
    "select_checkpoint": ["run=a"],
    "generate": ["hf_dir=a", "prompt=b"],
    "reproduce": ["run=a"],
    "pretrain": ["model=tiny"],
    "sft": ["model=tiny"],
    "dry_run_sft": ["model=tiny"],
    "build_index_sft": ["model=tiny"],
    "dry_run": ["model=tiny"],
    "plan_search": ["model=tiny", "world_size=1"],
    "build_index": ["model=tiny"],
    "explain": ["run=a", "sample=0"],
    "prove_mixture": ["run=a"],
    "status": ["run_dir=a"],
    "plot": ["run_dir=a"],
    "verify_checkpoint": ["folder=a"],
    "verify_export": ["hf_dir=a"],
}


def test_the_released_models_have_presets() -> None:
    assert set(presets("model")) >= RELEASED | {"tiny", "small"}


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_composes(root: str) -> None:
    assert (CONF_DIR / f"{root}.yaml").is_file()
    assert type(compose(root, REQUIRED[root])) is ROOTS[root]


@pytest.mark.parametrize("preset", presets("model"))
def test_every_model_dry_runs(preset: str) -> None:
    assert main([f"model={preset}"]) == 0


@pytest.mark.parametrize("experiment", presets("experiment"))
def test_every_experiment_plans(experiment: str) -> None:
    words = [f"experiment={experiment}"]
    if experiment in FINE_TUNED:
        given = [f"model={FINE_TUNED[experiment]}", "data.tokenizer=that_of_init_from"]
        config = compose("sft", [*words, *given])
        make_any_length(config)
    else:
        config = compose("pretrain", words)
    make_plan(config, FIXED_WORLDS.get(experiment, smallest_world(config.parallel)))


def make_any_length(config: Config) -> None:
    """Give a run in epochs some steps: how many, only its shards know."""
    if config.train.num_epochs:
        config.train.num_epochs, config.train.num_steps = None, NUM_STEPS
    for phase in config.phases.values():
        assert phase.num_epochs
        phase.num_epochs, phase.num_steps = None, NUM_STEPS
        config.train.num_steps += NUM_STEPS


@pytest.mark.parametrize(
    ("group", "preset"),
    [
        (group, preset)
        for group in groups()
        if group not in ("model", "experiment", "curation")
        for preset in presets(group)
    ],
)
def test_every_other_preset_plans(group: str, preset: str) -> None:
    words = ["model=ring_mini_linear_2_0" if group == "kernels" else "model=tiny"]
    if group == "train":
        words.append("optim=short")
    if group == "lora":
        words += ["init_from=unread", "model.moe_router_bias_update_rate=0"]
    config = compose("pretrain", [*words, f"{group}={preset}"])
    make_any_length(config)
    make_plan(config, smallest_world(config.parallel))


def test_the_demo_is_what_the_readme_promises() -> None:
    config = compose("pretrain", ["experiment=demo"])
    model = config.model
    plan = make_plan(config, 2)
    assert config.run_dir == "runs/demo"
    assert model.num_layers >= 8
    assert model.layer_group_size == 4
    assert plan.layers.channel_mixers == ("dense",) + ("moe",) * (model.num_layers - 1)
    assert (model.num_moe_experts, model.moe_router_topk, plan.layers.num_mtp) == (16, 2, 1)
    assert model.moe_router_num_groups
    assert model.num_shared_experts
    assert (plan.mesh.world_size, plan.mesh.ep) == (2, 2)


@pytest.mark.parametrize("path", sorted(CONF_DIR.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_says_what_it_is(path: Path) -> None:
    text = path.read_text(encoding="ascii")
    assert isinstance(yaml.safe_load(text), dict)
    assert text.startswith("# "), "begin with a comment"
