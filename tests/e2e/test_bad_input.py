"""What a person gets wrong stops before training: status 2, one message, nothing damaged."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import OnRanks
from tests.e2e.commands import contents, run_command, run_job, succeed

Tensors = dict[str, torch.Tensor]


def assert_refused(on_ranks: OnRanks, job: str, words: list[str], *parts: str) -> None:
    """The command exits with 2 and one line on stderr that contains every part."""
    outcome = run_job(on_ranks, 1, job, words)
    assert outcome.status == 2, outcome
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert not outcome.stdout


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["model=tinny"], ["model=tinny is not a preset; did you mean tiny?"]),
        (["model.vocab_size=510"], ["has 512 ids, more than model.vocab_size=510; set"]),
        (
            ["data.domains.code.path={corpus}/crumb"],
            ["crumb.bin has", "fewer than train.seq_length + 1 = 65; shorten the rows or"],
        ),
        (["train.stop_after_step=0"], ["train.stop_after_step=0 is not positive"]),
        (
            ["init_from={corpus}/nowhere"],
            ["nowhere is no folder; name a Hugging Face folder with config.json, RUN_DIR"],
        ),
    ],
    ids=["preset", "vocabulary", "short corpus", "step", "init_from"],
)
def test_pretrain_stops_before_it_makes_a_folder(
    change: list[str],
    parts: list[str],
    training: list[str],
    corpus: Path,
    on_ranks: OnRanks,
    tmp_path: Path,
) -> None:
    before = contents(corpus)
    words = [*training, f"run_dir={tmp_path}/run", *(word.format(corpus=corpus) for word in change)]
    assert_refused(on_ranks, "pretrain", words, *parts)
    assert not (tmp_path / "run").exists()
    assert contents(corpus) == before


def drop(tensors: Tensors) -> str:
    name = "model.layers.1.mlp.gate.expert_bias"
    del tensors[name]
    return f"1 tensors missing: {name}"


def add(tensors: Tensors) -> str:
    name = "model.layers.9.input_layernorm.weight"
    tensors[name] = torch.ones(64)
    return f"1 tensors extra: {name}"


def misshape(tensors: Tensors) -> str:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].T.contiguous()
    return f"1 tensors misshapen: {name} [64, 128] not [128, 64]"


@pytest.fixture(params=[drop, add, misshape], ids=lambda damage: damage.__name__)
def damaged(request: pytest.FixtureRequest, exported: Path, tmp_path: Path) -> tuple[Path, str]:
    """(an export with one wrong tensor, what is wrong with it)."""
    from safetensors.torch import load_file, save_file

    damage: Callable[[Tensors], str] = request.param
    folder = tmp_path / "damaged"
    shutil.copytree(exported, folder)
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    problem = damage(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})
    return folder, problem


def test_a_folder_with_a_wrong_tensor_starts_no_run_and_is_not_scored(
    damaged: tuple[Path, str], training: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    folder, problem = damaged
    before = contents(folder)
    words = [*training, f"run_dir={tmp_path}/run", f"init_from={folder}"]
    assert_refused(on_ranks, "pretrain", words, str(folder), problem)
    assert not (tmp_path / "run").exists()

    prompts, output = tmp_path / "prompts.json", tmp_path / "scores.json"
    prompts.write_text(json.dumps({"prompts": [[1, 2, 3]]}))
    output.write_text("from before")
    words = [f"hf_dir={folder}", f"prompts={prompts}", f"output={output}"]
    assert_refused(on_ranks, "score", words, str(folder), problem)
    assert output.read_text() == "from before"
    assert contents(folder) == before


def test_a_folder_that_does_not_say_its_decay_rule_needs_one(
    exported: Path, training: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(exported, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["decay_layer_rule"]
    (folder / "config.json").write_text(json.dumps(config))
    words = [*training, "train.stop_after_step=1", f"run_dir={tmp_path}/run"]
    words.append(f"init_from={folder}")
    assert_refused(on_ranks, "pretrain", words, "has no decay_layer_rule")
    other = "model.decay_layer_rule=zero_based (folder: shifted)"
    assert_refused(on_ranks, "pretrain", [*words, "decay_layer_rule=shifted"], other)
    assert not (tmp_path / "run").exists()
    succeed(on_ranks, 1, "pretrain", [*words, "decay_layer_rule=zero_based"])


def test_a_run_folder_of_another_model_is_refused(
    trained: Path, training: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    before = contents(run_dir)
    words = [*training, f"run_dir={run_dir}", "model.num_moe_experts=16"]
    message = "checkpoint of another model: model.num_moe_experts=16 (checkpoint: 8)"
    assert_refused(on_ranks, "pretrain", words, message)
    assert contents(run_dir) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("path={corpus}/math", "the run has read 32 samples, .*domains.code.shard="),
        ("valid_path={corpus}/math_valid", "run_dir=.* was started on other data of code.valid"),
    ],
    ids=["training", "held-out"],
)
def test_a_run_folder_on_other_data_is_refused_by_all_ranks(
    change: str,
    message: str,
    trained: Path,
    corpus: Path,
    training: list[str],
    on_ranks: OnRanks,
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    before = contents(run_dir)
    words = [*training, "parallel=ep2", f"run_dir={run_dir}"]
    words.append(f"data.domains.code.{change.format(corpus=corpus)}")
    for outcome in on_ranks(2, run_command, "ring_train.jobs.pretrain", words):
        assert outcome.status == 2
        assert re.search(f"^error: {message}", outcome.stderr.splitlines()[-1])
    assert contents(run_dir) == before


def test_export_names_what_is_no_checkpoint(
    trained: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    torn = tmp_path / "run" / "checkpoints" / "step_00000008"
    shutil.copytree(trained / "checkpoints" / "step_00000008", torn)
    (torn / "train_state.json").unlink()
    words = [f"checkpoint={tmp_path}/run", f"output={tmp_path}/out"]
    assert_refused(on_ranks, "export", words, "neither a complete checkpoint nor a run folder")
    assert not (tmp_path / "out").exists()
