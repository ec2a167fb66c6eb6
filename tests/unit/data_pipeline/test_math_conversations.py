"""Arithmetic conversations and problems: correct, held out, the same every time."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import PipelineError
from data_pipeline.demo_corpus import DemoCorpus, _math_documents
from data_pipeline.math_conversations import MathConversations, products, sums
from data_pipeline.math_conversations import write_math_conversations as write
from data_pipeline.math_problems import (
    Problem,
    is_held_out,
    parse_math_line,
    problem_key,
    solve_problem,
)

SIZES = {"conversations": 400, "answers": 500, "problems": 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("math")
    write(MathConversations(output=str(path), **SIZES))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def problem_of(question: str) -> Problem:
    """Return the problem of "Compute 12 + 34 - 5."."""
    words = question.removeprefix("Compute ").removesuffix(".").split(" ")
    return solve_problem(tuple(map(int, words[::2])), tuple(words[1::2]))


def key_of(question: str) -> str:
    """Return the same text for every order of the terms of a question."""
    return problem_key(problem_of(question))


def is_kept_from_training(question: str) -> bool:
    """Return whether the math domain keeps a problem for its held-out split."""
    return is_held_out(problem_of(question), fraction=0.1)


def questions(records: list[dict[str, Any]]) -> list[str]:
    return [record["messages"][0]["content"] for record in records]


def test_no_problem_is_trained_on_in_any_order(folder: Path) -> None:
    problems = {key_of(record["problem"]) for record in read(folder / "three_operands.jsonl")}
    assert len(problems) == SIZES["problems"]
    conversations = [*read(folder / "chain.jsonl"), *read(folder / "answer.jsonl")]
    assert len(conversations) == SIZES["conversations"] + SIZES["answers"]
    assert not problems & {key_of(question) for question in questions(conversations)}
    assert not any(map(is_kept_from_training, questions(conversations)))
    assert all(
        is_kept_from_training(record["problem"]) for record in read(folder / "three_operands.jsonl")
    )


def test_no_problem_is_in_the_training_split_of_the_math_domain(folder: Path) -> None:
    problems = {key_of(record["problem"]) for record in read(folder / "three_operands.jsonl")}
    lines = [
        line
        for document in _math_documents(DemoCorpus(output="unused"))["train"]
        for line in document.text.splitlines()
    ]
    trained = {problem_key(problem) for line in lines if (problem := parse_math_line(line))}
    assert len(trained) > 20_000
    assert not problems & trained


def test_chains_are_those_of_the_math_domain_and_lead_to_the_answer(folder: Path) -> None:
    for record in read(folder / "chain.jsonl"):
        question, answer = record["messages"]
        line = f"{question['content']} {answer['reasoning_content']} {answer['content']}"
        problem = parse_math_line(line)
        assert problem is not None
        assert problem.answer == problem.value()
        assert all(10 <= operand <= 99 for operand in problem.operands)


@pytest.mark.parametrize("name", ["three_operands", "four_operands", "multiplication"])
def test_expected_answers_are_right(folder: Path, name: str) -> None:
    records = read(folder / f"{name}.jsonl")
    assert len({record["id"] for record in records}) == SIZES["problems"]
    for record in records:
        expression = re.fullmatch(r"Compute ([\d +*-]+)\.", record["problem"])
        assert expression
        assert str(eval(expression[1])) == record["answer"]  # digits and operators only


def test_answers_of_the_control_have_no_reasoning(folder: Path) -> None:
    for record in read(folder / "answer.jsonl"):
        question, answer = record["messages"]
        assert answer.keys() == {"role", "content"}
        value = eval(question["content"].removeprefix("Compute ").removesuffix("."))
        assert answer["content"] == f"\\boxed{{{value}}}"


def test_the_same_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write(MathConversations(output=str(tmp_path), **SIZES))
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    write(MathConversations(output=str(tmp_path), **SIZES, seed=5))
    assert (tmp_path / "chain.jsonl").read_bytes() != (folder / "chain.jsonl").read_bytes()


def test_partial_sums_are_never_negative() -> None:
    for problem in itertools.islice(sums(0, num_operands=4), 200):
        signed = [problem.operands[0]]
        for sign, operand in zip(problem.signs, problem.operands[1:], strict=True):
            signed.append(operand if sign == "+" else -operand)
        assert min(itertools.accumulate(signed)) >= 0
    assert len(list(products(0))) == 90 * 8


@pytest.mark.parametrize("key", SIZES)
def test_a_number_that_is_not_positive_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(PipelineError, match=f"{key}=0 is not positive; choose 1 or more"):
        write(MathConversations(output=str(tmp_path), **{key: 0}))
