"""An evaluation that cannot be run is refused before a problem is read."""

import pytest

from ring_train.config import compose
from ring_train.plan import PlanError, make_plan

VALID = [
    "model=tiny",
    "evaluation.problems.math=math.jsonl",
    "evaluation.interval_steps=10",
    "data.tokenizer=tokenizer",
]


def test_a_run_without_evaluation_needs_nothing() -> None:
    assert make_plan(compose("pretrain", ["model=tiny"]), 1).config.evaluation.problems == {}


def test_words_name_problems_and_variables_of_the_template() -> None:
    words = [*VALID, "evaluation=ring_lite", "evaluation.max_new_tokens=64"]
    words += ["evaluation.template_arguments.enable_thinking=false"]
    evaluation = make_plan(compose("pretrain", words), 1).config.evaluation
    assert evaluation.problems == {"math": "math.jsonl"}
    assert evaluation.template_arguments == {"enable_thinking": False}
    assert evaluation.instruction.endswith(r"within \boxed{}.")
    assert evaluation.top_p == 0.95


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.tokenizer=''"], "data.tokenizer is empty, and evaluation.problems are made"),
        (
            ["evaluation.temperature=0", "evaluation.num_samples=4"],
            "evaluation.num_samples=4 answers are all the same with evaluation.temperature=0",
        ),
        (
            ["evaluation.max_new_tokens=32768"],
            "evaluation.max_new_tokens=32768 leaves no room for a prompt in the model's context",
        ),
        (
            ["evaluation.prompt_format=text", "evaluation.template_arguments.a=1"],
            "which evaluation.prompt_format=text does not use; remove one",
        ),
        (["evaluation.top_p=1.5"], "evaluation.top_p=1.5 exceeds 1"),
        (["evaluation.top_p=0"], "evaluation.top_p=0.0 is not positive"),
        (["evaluation.temperature=-1"], "evaluation.temperature=-1.0 is negative"),
        (["evaluation.temperature=nan"], "evaluation.temperature=nan is negative"),
        (["evaluation.num_samples=0"], "evaluation.num_samples=0 is not positive"),
        (["evaluation.num_problems=0"], "evaluation.num_problems=0 is not positive"),
    ],
)
def test_contradictions_are_named(words: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(compose("pretrain", [*VALID, *words]), 1)


def test_an_interval_without_problems_is_refused() -> None:
    with pytest.raises(PlanError, match=r"interval_steps=10, but evaluation.problems is empty"):
        make_plan(compose("pretrain", ["model=tiny", "evaluation.interval_steps=10"]), 1)
