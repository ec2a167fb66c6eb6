"""Fine-tuning by the real commands: chat shards, epochs, a stop, an export; and bad input."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ring_train.config import read_yaml
from tests.conftest import OnRanks
from tests.e2e.commands import contents, run_job, succeed
from tests.e2e.conftest import made_once, pipeline

SEQ_LENGTH = 128
EPOCHS = 3
ROUNDING = 0.0005
"""Of three printed decimals."""
LAST_STEP = 0.25
"""One row more than the epochs may fill the last step; the smaller domain has four rows."""


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def chat(shared: Path, corpus: Path) -> Path:
    """Chat shards of two domains, tokenized with the corpus's tokenizer."""
    folder = shared / "chat"
    return made_once(folder, lambda: make_chat(folder, corpus / "tokenizer"))


def make_chat(folder: Path, tokenizer: Path) -> None:
    folder.mkdir()
    rng = random.Random(1)
    for name, size in (("math", 24), ("general", 12)):
        lines = []
        for _ in range(size):
            a, b = rng.randrange(100), rng.randrange(100)
            answer = {"role": "assistant", "content": f"<think>\n{a} + {b}\n</think>\n\n{a + b}"}
            question = {"role": "user", "content": f"{a} + {b} ="}
            lines.append(json.dumps({"messages": [question, answer]}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        words = [f"input={folder}/{name}.jsonl", f"tokenizer={tokenizer}"]
        thinking = 'template_arguments={"enable_thinking": true}'
        pipeline("tokenize", "format=chat", *words, f"output={folder}/{name}", thinking)


@pytest.fixture(scope="session")
def words(chat: Path) -> list[str]:
    """Words of a fine-tuning run, all but where it begins and its run_dir."""
    return [
        *("optim=sft", "train.precision=fp32", f"train.num_epochs={EPOCHS}"),
        *(f"train.seq_length={SEQ_LENGTH}", "train.micro_batch_size=1"),
        *("train.global_batch_size=2", "optim.lr=1e-3", "logging.progress=false"),
        *("checkpoint.interval_steps=100", "checkpoint.keep=null"),
        *(f"data.domains.{name}.path={chat}/{name}" for name in ("math", "general")),
    ]


@pytest.fixture
def tuned(shared: Path, words: list[str], trained: Path, on_ranks: OnRanks) -> Path:
    """An uninterrupted run from the newest checkpoint of a pretraining run, on two ranks."""
    folder = shared / "tuned"
    run = [*words, "parallel=ep2", f"init_from={trained}", f"run_dir={folder}"]
    return made_once(folder, lambda: succeed(on_ranks, 2, "sft", run))


def test_model_and_tokenizer_come_from_the_checkpoint(tuned: Path, trained: Path) -> None:
    before, after = (read_yaml(folder / "config.yaml") for folder in (trained, tuned))
    assert after.data.tokenizer == before.data.tokenizer
    assert after.model.hidden_size == before.model.hidden_size
    assert after.model.moe_router_bias_update_rate == 0 < before.model.moe_router_bias_update_rate


def test_a_run_in_epochs_reads_every_row_as_often(tuned: Path, on_ranks: OnRanks) -> None:
    metrics = records(tuned / "metrics.jsonl")
    assert len(metrics) == read_yaml(tuned / "config.yaml").train.num_steps
    assert {"lm_loss/math", "lm_loss/general", "trained_tokens/math"} <= metrics[0].keys()
    assert metrics[-1]["lm_loss"] < metrics[0]["lm_loss"]
    assert metrics[-1]["learning_rate"] == 0
    outcome = succeed(on_ranks, 1, "prove_mixture", [f"run={tuned}"])
    epochs = [
        float(line.split()[-1]) for line in outcome.stdout.splitlines() if " train " in f" {line}"
    ]
    assert all(EPOCHS - ROUNDING <= read <= EPOCHS + LAST_STEP for read in epochs), outcome.stdout


def test_a_run_stopped_in_an_epoch_resumes_bit_for_bit(
    tuned: Path, trained: Path, words: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    run = [*words, "parallel=ep2", f"init_from={trained}", f"run_dir={tmp_path / 'run'}"]
    num_steps = read_yaml(tuned / "config.yaml").train.num_steps
    stop = num_steps // EPOCHS + 2  # in the second epoch, not at its beginning
    first = succeed(on_ranks, 2, "sft", [*run, f"train.stop_after_step={stop}"])
    assert f"phase train: {EPOCHS} epochs of general" in first.stderr
    outcome = succeed(on_ranks, 2, "sft", run)
    assert "other values" not in outcome.stderr
    resumed = tmp_path / "run"
    assert (resumed / "metrics.jsonl").read_bytes() == (tuned / "metrics.jsonl").read_bytes()
    step = f"step_{num_steps:08d}"
    digests = [
        succeed(on_ranks, 1, "verify_checkpoint", [f"folder={folder}/checkpoints/{step}"]).stdout
        for folder in (tuned, resumed)
    ]
    tensors = [[line for line in text.splitlines() if "/" in line.split()[-1]] for text in digests]
    assert len(tensors[0]) > 10
    assert [line.split()[0] for line in tensors[0]] == [line.split()[0] for line in tensors[1]]


def test_an_exported_folder_is_tuned_again_with_a_longer_context(
    tuned: Path, words: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    """From a Hugging Face folder, with YaRN and without MTP; what was set is exported."""
    first, run, second = (tmp_path / name for name in ("first", "run", "second"))
    succeed(on_ranks, 1, "export", [f"checkpoint={tuned}", f"output={first}", "precision=fp32"])
    stretched = ["model.rotary_scaling_factor=4", "model.original_max_position_embeddings=4096"]
    changes = [*stretched, "model.rotary_base=600000", "model.mtp_num_layers=0"]
    start = [f"init_from={first}", f"run_dir={run}", "train.stop_after_step=1"]
    succeed(on_ranks, 1, "sft", [*words, *start, *changes])
    succeed(on_ranks, 1, "export", [f"checkpoint={run}", f"output={second}", "precision=fp32"])
    config = json.loads((second / "config.json").read_text())
    assert config["rope_theta"] == 600000
    assert config["rope_scaling"]["factor"] == 4
    assert config["max_position_embeddings"] == 4 * 4096
    assert config["num_nextn_predict_layers"] == 0
    assert contents(first)["tokenizer.json"] == contents(second)["tokenizer.json"]


def test_stages_are_phases_of_one_run(
    trained: Path, words: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    stages = ["phases.math.num_epochs=2", "phases.math.weights.math=1"]
    stages += ["phases.mixed.num_epochs=1", "phases.mixed.weights.general=1"]
    stages += ["phases.mixed.weights.math=0.25"]
    run = [*words, "train.num_epochs=null", *stages, f"init_from={trained}"]
    succeed(on_ranks, 1, "sft", [*run, f"run_dir={tmp_path / 'run'}"])
    ledger = records(tmp_path / "run" / "ledger.jsonl")[-1]["tokens"]
    assert ledger["math"]["general"] == 0 < ledger["math"]["math"]
    assert ledger["mixed"]["general"] > ledger["mixed"]["math"] > 0


def refused(on_ranks: OnRanks, words: list[str], num_ranks: int = 1) -> str:
    outcome = run_job(on_ranks, num_ranks, "sft", words)
    assert outcome.status == 2
    assert "Traceback" not in outcome.stderr
    return outcome.stderr


def test_bad_input_is_refused(
    trained: Path, words: list[str], chat: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    run = [*words, f"run_dir={tmp_path / 'run'}"]
    assert "add init_from=DIR" in refused(on_ranks, run)
    missing = refused(on_ranks, [*run, f"init_from={tmp_path}/missing"])
    assert "is no folder; name a Hugging Face folder with config.json, RUN_DIR" in missing
    message = refused(on_ranks, [*run, f"init_from={tmp_path}"])
    assert f"init_from={tmp_path} is neither a complete checkpoint nor a run folder" in message
    begin = [*run, f"init_from={trained}"]
    assert "documents are longer than seq_length=16" in refused(
        on_ranks, [*begin, "train.seq_length=16"]
    )
    both = refused(on_ranks, [*begin, "train.num_steps=3"])
    assert "both give the length of the run; set train.num_steps=0" in both
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_another_tokenizer_than_that_of_the_weights_is_refused(
    trained: Path, words: list[str], chat: Path, corpus: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    """On both ranks, before a step is made."""
    other = tmp_path / "tokenizer"
    pipeline("train_tokenizer", f"input={corpus}/code.jsonl", f"output={other}", "vocab_size=512")
    prefix = tmp_path / "math"
    source = [f"input={chat}/math.jsonl", f"tokenizer={other}", f"output={prefix}"]
    pipeline("tokenize", "format=chat", *source)
    run = [word for word in words if ".general." not in word]
    run += [f"data.domains.math.path={prefix}", f"data.tokenizer={other}"]
    run += [f"init_from={trained}", f"run_dir={tmp_path / 'run'}"]
    message = refused(on_ranks, run, num_ranks=2)
    assert f"data.tokenizer={other} gives other ids than the tokenizer of init_from" in message
    assert "model of tokenizer.json differ" in message


def test_a_run_that_has_begun_needs_its_start_no_more(
    trained: Path, words: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    """And it refuses another one: its weights are its own by then."""
    start = tmp_path / "start"
    shutil.copytree(trained / "checkpoints" / "step_00000004", start)
    run = [*words, f"run_dir={tmp_path / 'run'}"]
    begin = [*run, f"init_from={start}"]
    succeed(on_ranks, 1, "sft", [*begin, "train.stop_after_step=1"])
    message = refused(on_ranks, [*run, f"init_from={trained}"])
    assert f"init_from={trained}, but the run in run_dir={tmp_path / 'run'} began from" in message
    shutil.rmtree(start)
    outcome = succeed(on_ranks, 1, "sft", [*begin, "train.stop_after_step=2"])
    assert "step 2/" in outcome.stderr


def test_planning_and_indexing_are_those_of_the_run(
    tuned: Path, trained: Path, words: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    """`job=sft` packs as the run does and takes the model from where it does."""
    run = ["job=sft", *words, f"init_from={trained}", f"run_dir={tmp_path / 'run'}"]
    num_steps = read_yaml(tuned / "config.yaml").train.num_steps
    outcome = succeed(on_ranks, 1, "build_index", run)
    ledger = records(tuned / "ledger.jsonl")[-1]["tokens"]["train"]
    for name, tokens in ledger.items():
        assert re.search(rf"train +{name} +{tokens:,} ", outcome.stdout), outcome.stdout
    outcome = succeed(on_ranks, 1, "dry_run", run)
    assert re.search(rf"steps 1 to {num_steps} =", outcome.stdout), outcome.stdout
