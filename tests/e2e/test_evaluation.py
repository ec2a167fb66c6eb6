"""A model answers problems while it trains and by a command of its own, with the same result."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.bigrams import ADDING, bigram_embedding, bigram_output, chain
from tests.conftest import OnRanks
from tests.e2e.commands import Outcome, contents, run_job, succeed
from tests.e2e.conftest import made_once

LAYOUT_TOLERANCE = 1e-4
"""Of figures of fp32 models, whose sums run in another order."""
WRITTEN = r"<think>a</think>\boxed{7}"
STILL = ["optim.lr=1e-12", "optim.min_lr=0", "optim.weight_decay=0"]
"""The weights stay what they are to all purposes."""


@pytest.fixture
def writer(shared: Path, exported: Path) -> Path:
    """A folder whose model writes WRITTEN after each prompt, most of the time."""
    folder = shared / "writer"
    return made_once(folder, lambda: make_writer(exported, folder))


def make_writer(exported: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    from ring_train.hf.prompts import PromptTokenizer

    shutil.copytree(exported, folder)
    (shard,) = folder.glob("*.safetensors")
    tensors = load_file(shard)
    ids = PromptTokenizer(folder).text_prompt(f"</role>{WRITTEN}<|role_end|>").ids
    embedding = bigram_embedding(*tensors["lm_head.weight"].shape)
    for name, tensor in tensors.items():
        if name.endswith(ADDING):
            tensor.zero_()
    tensors["model.word_embeddings.weight"] = embedding
    tensors["lm_head.weight"] = bigram_output(embedding, chain(ids))
    save_file(tensors, shard, metadata={"format": "pt"})


@pytest.fixture
def problems(tmp_path: Path) -> list[str]:
    """Words that name two files of problems; to three of five the answer is 7."""
    answers = {"small": ["7", "8"], "large": ["14/2", "700", "7.0"]}
    words = ["evaluation.max_new_tokens=24", "evaluation.num_samples=2"]
    for domain, expected in answers.items():
        path = tmp_path / f"{domain}.jsonl"
        records = [{"problem": f"{domain} {x}?", "answer": x} for x in expected]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        words.append(f"evaluation.problems.{domain}={path}")
    return words


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_folder_is_evaluated_alike_by_one_rank_and_by_two(
    writer: Path, problems: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    outcomes, figures = [], []
    for num_ranks, layout in ((1, "single"), (2, "tp2")):
        output, answers = tmp_path / f"{layout}.json", tmp_path / f"{layout}.jsonl"
        words = [f"hf_dir={writer}", *problems, f"parallel={layout}"]
        words += [f"output={output}", f"answers={answers}"]
        outcomes.append(succeed(on_ranks, num_ranks, "evaluate", words))
        found = json.loads(output.read_text())
        assert found.pop("source") == str(writer)
        assert found.pop("evaluation")["num_samples"] == 2
        figures.append(found)
        lines = records(answers)
        assert len(lines) == 10
        assert sum(line["correct"] for line in lines) / 10 == pytest.approx(found["accuracy"])
        for line in lines:
            right = line["expected"] in ("7", "14/2", "7.0") and line["boxed"] == "7"
            assert line["correct"] == right
            assert line["prompt"].endswith("?<|role_end|><role>ASSISTANT</role>")
    assert figures[0] == pytest.approx(figures[1], abs=LAYOUT_TOLERANCE)
    assert 0.3 < figures[0]["accuracy"] <= 0.6
    assert outcomes[0].stdout == outcomes[1].stdout
    head, *rows = outcomes[0].stdout.splitlines()
    assert head.split()[:2] == ["accuracy", "+-"]
    assert [row.split()[0] for row in rows] == ["small", "large", "all"]


def test_a_run_is_evaluated_and_not_changed_by_it(
    writer: Path, training: list[str], problems: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    words = [*training, *STILL, "parallel=ep2", f"init_from={writer}", "checkpoint.keep=null"]
    words += ["train.eval_interval_steps=0", "checkpoint.interval_steps=2"]
    without, run = tmp_path / "without", tmp_path / "run"
    succeed(on_ranks, 2, "pretrain", [*words, "train.stop_after_step=4", f"run_dir={without}"])
    words += [*problems, "evaluation.interval_steps=2", f"run_dir={run}"]
    succeed(on_ranks, 2, "pretrain", [*words, "train.stop_after_step=3"])
    outcome = succeed(on_ranks, 2, "pretrain", [*words, "train.stop_after_step=4"])
    assert "step 4  accuracy 0." in outcome.stderr

    assert (run / "metrics.jsonl").read_bytes() == (without / "metrics.jsonl").read_bytes()
    states = [contents(folder / "checkpoints" / "step_00000004") for folder in (run, without)]
    tensors = [{k: v for k, v in state.items() if k.endswith(".safetensors")} for state in states]
    assert len(tensors[0]) == 2
    assert tensors[0] == tensors[1]

    evaluations = records(run / "evaluation.jsonl")
    assert [record["step"] for record in evaluations] == [2, 4]
    assert sorted(path.name for path in (run / "answers").iterdir()) == [
        "step_00000002.jsonl",
        "step_00000004.jsonl",
    ]
    assert not (without / "evaluation.jsonl").exists()
    assert (run / "curves.png").stat().st_size > (without / "curves.png").stat().st_size

    output = tmp_path / "job.json"
    words = [f"checkpoint={run}/checkpoints/step_00000004", *problems, f"output={output}"]
    succeed(on_ranks, 1, "evaluate", words)
    by_job, by_run = json.loads(output.read_text()), evaluations[1]
    for key, value in by_run.items():
        if key != "step":
            assert by_job[key] == pytest.approx(value, abs=LAYOUT_TOLERANCE), key
    select(on_ranks, run)


def test_adapters_are_evaluated_with_their_weights(
    writer: Path, training: list[str], problems: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    run, output = tmp_path / "run", tmp_path / "job.json"
    words = [*training, f"init_from={writer}", "lora=attention", "optim.lr_warmup_steps=0"]
    words += ["model.moe_router_bias_update_rate=0"]
    words += ["optim.lr=0.05", "optim.wsd_decay_steps=0", "train.num_steps=2", f"run_dir={run}"]
    # No multiple of the interval, but the end.
    succeed(on_ranks, 1, "pretrain", [*words, *problems, "evaluation.interval_steps=5"])
    succeed(on_ranks, 1, "evaluate", [f"checkpoint={run}", *problems, f"output={output}"])
    (by_run,), by_job = records(run / "evaluation.jsonl"), json.loads(output.read_text())
    for key in ("accuracy", "entropy_nats", "length_tokens"):
        assert by_job[key] == by_run[key], key
    succeed(on_ranks, 1, "evaluate", [f"hf_dir={writer}", *problems, f"output={output}"])
    assert json.loads(output.read_text())["entropy_nats"] != by_run["entropy_nats"]


def select(on_ranks: OnRanks, run: Path) -> None:
    """Select among the checkpoints of steps 2, 3 and 4, of which 3 was not evaluated."""
    words = [f"run={run}", "min_entropy=0", "max_entropy=9"]
    inside = succeed(on_ranks, 1, "select_checkpoint", words).stdout.splitlines()
    assert inside[-1] == f"{run}/checkpoints/step_00000002"
    assert inside[-2] == "no evaluation of saved steps: 3"
    words = [f"run={run}", "min_entropy=8", "max_entropy=9"]
    outside = run_job(on_ranks, 1, "select_checkpoint", words)
    assert outside.status == 1
    assert "no entropy is in [8.0, 9.0]: the nearest is chosen" in outside.stdout


def refused(outcome: Outcome, *parts: str) -> None:
    assert outcome.status == 2, outcome
    for part in parts:
        assert part in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not outcome.stdout


def test_bad_problems_stop_a_run_before_it_makes_a_folder(
    training: list[str], problems: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    words = [*training, *problems, "evaluation.interval_steps=2", f"run_dir={tmp_path}/run"]
    path = tmp_path / "small.jsonl"
    path.write_text('{"problem": "x", "answer": "7"}\n{"problem": "x"}\n')
    outcome = run_job(on_ranks, 1, "pretrain", words)
    refused(outcome, f"error: {path}:2 has no answer")
    long = [{"problem": "word " * 5000, "answer": "7"}, {"problem": "x", "answer": "1 + " * 600}]
    path.write_text("".join(json.dumps(record) + "\n" for record in long))
    outcome = run_job(on_ranks, 1, "pretrain", words)
    refused(outcome, f"error: {path}:1: the prompt has ", "leaves 4072 of the model's context")
    assert f"{path}:2: answer='1 + 1 + " in outcome.stderr
    assert "cannot be compared: longer than 2000 characters" in outcome.stderr
    assert not (tmp_path / "run").exists()


def test_evaluate_names_what_it_cannot_do(
    writer: Path, problems: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    for words, message in (
        ([*problems], "checkpoint=None and hf_dir=None: exactly one says"),
        ([f"hf_dir={writer}"], "evaluation.problems is empty: nothing to evaluate"),
        ([*problems, f"checkpoint={tmp_path}"], "is neither a complete checkpoint nor a run"),
        ([*problems, f"hf_dir={writer}", f"tokenizer={tmp_path}"], "lacks tokenizer.json"),
    ):
        refused(run_job(on_ranks, 1, "evaluate", words), message)
