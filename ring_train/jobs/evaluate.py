"""Let a model answer problems: `python -m ring_train.jobs.evaluate checkpoint=DIR|hf_dir=DIR`.

`evaluation.problems.DOMAIN=FILE` names them, the other keys of `evaluation` say how answers are
drawn. Alone or under torchrun, with any `parallel.*`, whatever layout saved the weights. Prints a
table; `output=FILE` receives the figures as JSON, `answers=FILE` the answers.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ring_train.config import (
    DataConfig,
    EvaluateConfig,
    Precision,
    compose,
)
from ring_train.errors import UserError
from ring_train.jobs.forward_config import forward_config, world_size
from ring_train.jobs.initial_model import InitialModel, read_initial_model
from ring_train.jobs.results import check_writable, write_json
from ring_train.plan import Plan, make_plan
from ring_train.runtime.errors import run_job

if TYPE_CHECKING:
    from ring_train.train.answers import EvaluationResult

COLUMNS = {
    "accuracy": ("accuracy", ".4f"),
    "accuracy_standard_error": ("+-", ".4f"),
    "entropy_nats": ("entropy (nats)", ".4f"),
    "length_tokens": ("length (tokens)", ".1f"),
    "unfinished_fraction": ("unfinished", ".4f"),
    "num_problems": ("problems", ".0f"),
    "grader_failures": ("not graded", ".0f"),
}
"""Key of a figure -> heading and format."""


def main(overrides: list[str]) -> None:
    """Evaluate what the overrides name."""
    config: EvaluateConfig = compose("evaluate", overrides)
    check_files(config)
    source = read_source(config)
    plan = evaluation_plan(config, source)
    result = evaluate(plan, source)
    if int(os.environ.get("RANK", "0")) == 0:
        write_result(config, source, result)


def check_files(config: EvaluateConfig) -> None:
    """Raise a UserError if a file that was asked for cannot be written."""
    for key, path in (("output", config.output), ("answers", config.answers)):
        if path:
            check_writable(key, path)
    if config.output and config.output == config.answers:
        raise UserError(f"output and answers are both {config.output}; name two files")


def read_source(config: EvaluateConfig) -> InitialModel:
    """Return what is evaluated.

    Raises:
        UserError: not exactly one source is given, or it is not what it should be.
    """
    if (config.checkpoint is None) == (config.hf_dir is None):
        raise UserError(
            f"checkpoint={config.checkpoint} and hf_dir={config.hf_dir}: exactly one says which "
            "weights to evaluate; give one of them"
        )
    key = "checkpoint" if config.hf_dir is None else "hf_dir"
    path = config.checkpoint or config.hf_dir or ""
    source = read_initial_model(path, config.decay_layer_rule, key)
    if (source.precision is None) != (key == "hf_dir"):
        other = "hf_dir" if key == "checkpoint" else "checkpoint"
        raise UserError(f"{key}={path} is a folder of the other kind; write {other}={path}")
    return source


def evaluation_plan(config: EvaluateConfig, source: InitialModel) -> Plan:
    """Return the plan of the job.

    Raises:
        UserError: no problems, or an illegal layout.
    """
    if not config.evaluation.problems:
        raise UserError(
            "evaluation.problems is empty: nothing to evaluate; "
            "add evaluation.problems.DOMAIN=FILE for each file of problems"
        )
    precision = config.precision or source.precision or Precision.fp32
    base = forward_config(source.model, config.parallel, precision=precision)
    base = dataclasses.replace(
        base,
        data=DataConfig(tokenizer=config.tokenizer or source.tokenizer),
        evaluation=config.evaluation,
        init_from=str(source.folder),
        lora=source.lora,
        seed=config.seed,
    )
    return make_plan(base, world_size())


def evaluate(plan: Plan, source: InitialModel) -> "EvaluationResult":
    """Return figures and answers of the model."""
    import ring_train.platform  # noqa: F401  (heavy imports only after the plan holds)
    from ring_train.checkpoint.checkpointer import load_weights
    from ring_train.hf.weights import load_hf_weights
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.answers import AnswerEvaluation
    from ring_train.train.questions import read_questions

    with start_runtime(plan) as groups:
        questions = read_questions(plan)
        model = build_model(plan, groups.collection)
        if source.precision is not None:
            load_weights(source.folder, model, plan, groups.collection)
        else:
            load_hf_weights(source.folder, plan.config.model, model)
        return AnswerEvaluation(plan, model, groups, questions).run()


def write_result(config: EvaluateConfig, source: InitialModel, result: "EvaluationResult") -> None:
    """Print the table and write the files that were asked for, figures first."""
    from ring_train.train.answers import write_answers

    sys.stdout.write(table(result.figures))
    if config.output:
        record = {
            "source": str(source.folder),
            "evaluation": dataclasses.asdict(config.evaluation),
            "seed": config.seed,
        }
        write_json(config.output, {**result.record(), **record})
    if config.answers:
        try:
            write_answers(Path(config.answers), result.answers)
        except OSError as error:
            raise UserError(
                f"answers={config.answers} cannot be written ({error}); name another file"
            ) from None


def table(figures: dict[str, Any]) -> str:
    """Return a line for each domain and one for all problems."""
    domains = [key.partition("/")[2] for key in figures if key.startswith("num_problems/")]
    rows = [["", *(heading for heading, _ in COLUMNS.values())]]
    for name, suffix in [*((domain, f"/{domain}") for domain in domains), ("all", "")]:
        values = [
            format(figures[key + suffix], form) if key + suffix in figures else "-"
            for key, (_, form) in COLUMNS.items()
        ]
        rows.append([name, *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + "\n"
        for row in rows
    )


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
