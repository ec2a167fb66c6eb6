"""The problems of an evaluation, as prompts of the trained model."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from ring_train.checkpoint.ranks import from_rank_0
from ring_train.config import EvaluationConfig, PromptFormat
from ring_train.data.problems import Problem, raise_faults, read_problems
from ring_train.errors import UserError
from ring_train.grading import Grader
from ring_train.hf.prompts import Prompt, PromptTokenizer
from ring_train.plan import Plan, context_tokens

logger = logging.getLogger(__name__)

MAX_SHOWN = 5
"""Expected answers named in a warning."""
DIGEST_CHARACTERS = 12


@dataclass(frozen=True, kw_only=True)
class Question:
    """A problem and the prompt made of it."""

    problem: Problem
    prompt: Prompt


@dataclass(frozen=True, kw_only=True)
class Questions:
    """All questions of an evaluation, domain by domain."""

    questions: tuple[Question, ...]
    stop_tokens: tuple[int, ...]
    """Ids that end an answer."""
    digest: str
    """Of problems, prompts and sampling: figures of the same one are comparable."""


def read_questions(plan: Plan) -> Questions:
    """Return the questions of `evaluation`. Rank 0 reads. Collective over all ranks.

    Raises:
        UserError: a file, a problem in it or the tokenizer is not what it should be.
    """
    return from_rank_0(lambda: make_questions(plan))


def make_questions(plan: Plan) -> Questions:
    """Return the questions of `evaluation`; not collective, see `read_questions`."""
    evaluation, model = plan.config.evaluation, plan.config.model
    tokenizer = PromptTokenizer(plan.config.data.tokenizer)
    if tokenizer.num_ids > model.vocab_size:
        raise UserError(
            f"tokenizer folder {plan.config.data.tokenizer} has {tokenizer.num_ids} ids, more than "
            f"model.vocab_size={model.vocab_size}; give the tokenizer that the model was trained on"
        )
    stops = {model.eos_token_id}
    if evaluation.prompt_format is PromptFormat.chat:
        end = tokenizer.end_of_turn(evaluation.template_arguments)
        if end is None:
            logger.warning(
                "the chat template of %s writes no special token after an answer: only "
                "model.eos_token_id=%d ends one, or max_new_tokens",
                plan.config.data.tokenizer,
                model.eos_token_id,
            )
        else:
            stops.add(end)
    context = min(context_tokens(model, phase.rotary_scaling_factor) for phase in plan.phases)
    questions, faults = [], []
    for domain, path in evaluation.problems.items():
        for problem in read_problems(domain, Path(path), evaluation.num_problems):
            try:
                question = Question(
                    problem=problem, prompt=_prompt(tokenizer, evaluation, problem, context)
                )
                questions.append(question)
            except UserError as error:
                faults.append(f"{problem.place}: {error}")
    faults += _answer_faults([question.problem for question in questions])
    raise_faults(faults)
    return Questions(
        questions=tuple(questions),
        stop_tokens=tuple(sorted(stops)),
        digest=_digest(evaluation, questions, sorted(stops)),
    )


def _digest(evaluation: EvaluationConfig, questions: list[Question], stops: list[int]) -> str:
    """Return a digest of all that figures depend on, but for weights and seed.

    Prompts stand for the format, the template and its arguments and the instruction.
    """
    values = [evaluation.num_samples, evaluation.temperature, evaluation.top_p]
    asked = [(q.problem.domain, q.problem.id, q.problem.answer, q.prompt.ids) for q in questions]
    text = json.dumps([*values, evaluation.max_new_tokens, stops, asked])
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS]


def _prompt(
    tokenizer: PromptTokenizer, evaluation: EvaluationConfig, problem: Problem, context: int
) -> Prompt:
    """Return the prompt of a problem, or raise a UserError without the place."""
    *before, last = problem.messages
    content = last["content"]
    if evaluation.instruction:
        content = f"{content}\n{evaluation.instruction}"
    if evaluation.prompt_format is PromptFormat.chat:
        messages = [*before, {**last, "content": content}]
        prompt = tokenizer.chat_prompt(messages, evaluation.template_arguments)
    elif problem.is_text:
        prompt = tokenizer.text_prompt(content)
    else:
        raise UserError("has messages, which evaluation.prompt_format=text cannot write; use chat")
    room = context - evaluation.max_new_tokens
    if len(prompt.ids) > room:
        raise UserError(
            f"the prompt has {len(prompt.ids)} tokens, and evaluation.max_new_tokens="
            f"{evaluation.max_new_tokens} leaves {room} of the model's context of {context}; "
            "lower max_new_tokens or leave the problem out"
        )
    return prompt


def _answer_faults(problems: list[Problem]) -> list[str]:
    """Return with which expected answers nothing can be compared; warn of those without value."""
    with Grader() as grader:
        checked = grader.check_expected([problem.answer for problem in problems])
    pairs = list(zip(problems, checked, strict=True))
    texts = [f"{p.place} ({p.answer!r})" for p, e in pairs if not (e.has_value or e.failure)]
    if texts:
        logger.warning(
            "math-verify finds no value in %d expected answers, so only the same text is right: %s",
            len(texts),
            ", ".join(texts[:MAX_SHOWN]) + ("" if len(texts) <= MAX_SHOWN else ", ..."),
        )
    return [
        f"{problem.place}: answer={problem.answer[:60]!r} cannot be compared: {expected.failure}; "
        "write a number or LaTeX"
        for problem, expected in pairs
        if expected.failure
    ]
