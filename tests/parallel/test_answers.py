"""An evaluation finds the same under every layout, and its figures are those of its answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bigrams import ADDING, bigram_embedding, bigram_output, chain
from tests.conftest import OnRanks
from tests.parallel.short_runs import EP2, PP2, TP2, short_plan
from tests.unit.data_pipeline.chat.shapes import write_shapes

LAYOUTS = {"tp2": TP2, "pp2": PP2, "ep2": EP2, "dp2": []}
ENTROPY_TOLERANCE = 1e-5
"""fp32 sums in another order."""
NUM_SAMPLES = 3
BOXED = "<think>a\n</think>\\boxed{7}"
"""What the model writes, and its token at the end of a turn."""


@pytest.fixture(scope="module")
def folder(warm_megatron: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems of two domains and a tokenizer; what ranks import is imported here."""
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    import ring_train.train.answers  # noqa: F401

    folder = tmp_path_factory.mktemp("answers")
    write_shapes(folder)
    for domain, answers in {"easy": ["7", "14/2", "7.0"], "hard": ["8", "7", "9", "x"]}.items():
        records = [{"id": f"{domain}-{a}", "problem": "b c", "answer": a} for a in answers]
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{domain}.jsonl").write_text("".join(lines))
    return folder


def evaluate(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Return figures and answers of the model that writes BOXED."""
    import torch

    from ring_train.hf.prompts import PromptTokenizer
    from ring_train.model.build import build_model
    from ring_train.model.tensors import local_tensors
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.answers import AnswerEvaluation
    from ring_train.train.questions import read_questions

    tokenizer = folder / "ours"
    words = [
        *(f"evaluation.problems.{name}={folder}/{name}.jsonl" for name in ("easy", "hard")),
        *("evaluation.max_new_tokens=24", f"evaluation.num_samples={NUM_SAMPLES}"),
        *("evaluation.max_batch_size=4", f"data.tokenizer={tokenizer}"),
    ]
    plan = short_plan([*words, *overrides])
    with start_runtime(plan) as groups:
        questions = read_questions(plan)
        model = build_model(plan, groups.collection)
        ids = PromptTokenizer(tokenizer).text_prompt(f"</role>{BOXED}<|role_end|>").ids
        size = plan.config.model.vocab_size, plan.config.model.hidden_size
        embedding = bigram_embedding(*size)
        with torch.no_grad():
            for item in local_tensors(model):
                if item.name == "embedding.word_embeddings.weight":
                    item.tensor.copy_(item.shard.of(embedding))
                elif item.name == "output_layer.weight":
                    item.tensor.copy_(item.shard.of(bigram_output(embedding, chain(ids))))
                elif item.name.endswith(ADDING):
                    item.tensor.zero_()
        evaluation = AnswerEvaluation(plan, model, groups, questions)
        result = evaluation.run()
        assert all(chunk.training for chunk in model)
    answers = [answer.record() for answer in result.answers]
    return {"figures": result.figures, "answers": answers, "rank": groups.rank}


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    """What one rank has found, filled by the first test."""
    return {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_evaluation_is_the_same_under_every_layout(
    layout: str, folder: Path, reference: dict[str, Any], on_ranks: OnRanks
) -> None:

    if not reference:
        reference |= on_ranks(1, evaluate, folder, [])[0]
    results = on_ranks(2, evaluate, folder, LAYOUTS[layout])
    for result in results:
        assert result["figures"] == results[0]["figures"]
        assert bool(result["answers"]) == (result["rank"] == 0)
    assert results[0]["figures"] == pytest.approx(reference["figures"], abs=ENTROPY_TOLERANCE)
    for ours, theirs in zip(results[0]["answers"], reference["answers"], strict=True):
        assert ours == theirs | {"entropy_nats": pytest.approx(theirs["entropy_nats"], abs=1e-5)}


def test_figures_are_those_of_the_answers(
    folder: Path, reference: dict[str, Any], on_ranks: OnRanks
) -> None:
    if not reference:
        reference |= on_ranks(1, evaluate, folder, [])[0]
    figures, answers = reference["figures"], reference["answers"]
    assert len(answers) == 7 * NUM_SAMPLES
    assert 0.3 < figures["accuracy"] < 0.7
    assert figures["accuracy/easy"] > 0.7
    assert 0 < figures["accuracy/hard"] < 0.3
    assert 0.01 < figures["entropy_nats"] < 1
    assert figures["num_problems/hard"] == 4
    assert figures["grader_failures"] == 0
    whole = [answer for answer in answers if answer["text"] == BOXED]
    assert len(whole) > len(answers) / 2
    for answer in answers:
        expected = answer["id"].startswith("easy") or answer["id"] == "hard-7"
        if answer["text"] == BOXED:
            assert (answer["boxed"], answer["finished"]) == ("7", True)
            assert answer["correct"] == expected
            assert answer["length_tokens"] == len("a\n\\boxed{7}") + len("<>") + 1
        assert answer["prompt"].endswith("<role>ASSISTANT</role>")
    correct = [answer["correct"] for answer in answers]
    assert figures["accuracy"] == pytest.approx(sum(correct) / len(correct))


def test_a_text_prompt_needs_no_chat(folder: Path, on_ranks: OnRanks) -> None:
    words = ["evaluation.prompt_format=text", "evaluation.instruction='b</role>'"]
    words += ["evaluation.temperature=0", "evaluation.num_samples=1"]
    (result,) = on_ranks(1, evaluate, folder, words)
    assert result["figures"]["accuracy/easy"] == 1
    assert result["figures"]["accuracy/hard"] == 0.25
    assert result["figures"]["entropy_nats"] > 0
    # Without a chat the turn's end is a token like others.
    assert {answer["text"][: len(BOXED)] for answer in result["answers"]} == {BOXED}
    assert result["figures"]["unfinished_fraction"] == 1
    assert {answer["prompt"] for answer in result["answers"]} == {"b c\nb</role>"}
