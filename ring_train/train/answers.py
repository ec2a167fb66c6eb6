"""Evaluation by generated answers: generate, grade, count.

Unusual: rank 0 alone decodes and grades, because what a time limit decides must be decided once;
the other ranks get the figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.distributed import DistributedDataParallel

from ring_train.checkpoint.ranks import from_rank_0
from ring_train.generation import Answer, Generator, Sampling
from ring_train.grading import Grade, Grader, after_thinking, last_boxed
from ring_train.hf.prompts import PromptTokenizer
from ring_train.plan import Plan
from ring_train.runtime.distributed import Groups
from ring_train.train.answer_figures import GradedAnswer, answer_figures, finite_or_none
from ring_train.train.questions import Question, Questions


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """What an evaluation found."""

    figures: dict[str, float]
    """The same on every rank; see `answer_figures`."""
    answers: list[GradedAnswer]
    """Ordered by problem and sample; empty but on rank 0."""
    digest: str
    """Evaluations of the same one are comparable; see `Questions`."""
    temperature: float

    def record(self) -> dict[str, float | str | None]:
        """Return the line of evaluation.jsonl; what is no number in JSON is null."""
        figures = {key: finite_or_none(value) for key, value in self.figures.items()}
        return {"digest": self.digest, "temperature": self.temperature, **figures}


@dataclass(frozen=True, kw_only=True)
class _Written:
    """An answer as text, with what is to be compared of it."""

    question: Question
    answer: Answer
    text: str
    boxed: str | None
    is_finished: bool


class AnswerEvaluation:
    """Answers the questions of an evaluation with a model as it is at the moment.

    Args:
        plan: the plan of the model.
        model: its chunks on this rank.
        groups: process groups and ranks.
        questions: what is asked.
    """

    def __init__(
        self,
        plan: Plan,
        model: list[DistributedDataParallel],
        groups: Groups,
        questions: Questions,
    ) -> None:
        self.config, self.groups, self.questions = plan.config.evaluation, groups, questions
        self.generator = Generator(
            plan,
            model,
            groups,
            max_batch_size=self.config.max_batch_size,
            max_prefill_tokens=self.config.max_prefill_tokens,
        )
        self.sampling = Sampling(
            max_new_tokens=self.config.max_new_tokens,
            stop_tokens=questions.stop_tokens,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            seed=plan.config.seed,
        )
        self.tokenizer_folder = plan.config.data.tokenizer
        self._tokenizer: PromptTokenizer | None = None

    def run(self) -> EvaluationResult:
        """Return figures and answers; the same questions and random numbers at every call.

        Weights, router counters and random states are not touched. Collective over all ranks.
        """
        prompts = [question.prompt.ids for question in self.questions.questions]
        answers = self.generator.generate(prompts, self.sampling, self.config.num_samples)
        graded: list[GradedAnswer] = []

        def grade() -> dict[str, float]:
            graded.extend(self._grade(answers))
            return answer_figures(graded, self.config.num_samples)

        return EvaluationResult(
            figures=from_rank_0(grade),
            answers=graded,
            digest=self.questions.digest,
            temperature=self.config.temperature,
        )

    def _grade(self, answers: Sequence[Answer]) -> list[GradedAnswer]:
        written = [self._written(answer) for answer in answers]
        pairs = [
            (item.question.problem.answer, item.boxed) for item in written if item.boxed is not None
        ]
        with Grader() as grader:
            grades = iter(grader.grade(pairs))
        wrong = Grade(is_correct=False)
        return [_graded(item, wrong if item.boxed is None else next(grades)) for item in written]

    def _written(self, answer: Answer) -> _Written:
        if self._tokenizer is None:
            self._tokenizer = PromptTokenizer(self.tokenizer_folder)
        question = self.questions.questions[answer.prompt]
        text = self._tokenizer.decode(answer.tokens[: -1 if answer.stopped else None])
        result = after_thinking(text, is_thinking=question.prompt.is_thinking)
        return _Written(
            question=question,
            answer=answer,
            text=text,
            boxed=None if result is None else last_boxed(result),
            is_finished=answer.stopped and result is not None,
        )


def _graded(item: _Written, grade: Grade) -> GradedAnswer:
    problem, answer = item.question.problem, item.answer
    return GradedAnswer(
        domain=problem.domain,
        id=problem.id,
        sample=answer.sample,
        prompt=item.question.prompt.text,
        text=item.text,
        expected=problem.answer,
        boxed=item.boxed,
        is_correct=grade.is_correct,
        is_finished=item.is_finished,
        failure=grade.failure,
        num_tokens=len(answer.tokens),
        entropy_nats=math.fsum(answer.entropies) / len(answer.tokens),
    )


def write_answers(path: Path, answers: Sequence[GradedAnswer]) -> None:
    """Write one JSON object a line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_text("".join(json.dumps(answer.record()) + "\n" for answer in answers))
        partial.replace(path)
    except OSError:
        if partial.is_file():
            partial.unlink()
        raise
