"""Pretrain a model: `python -m ring_train.jobs.pretrain experiment=NAME key=value ...`.

Under torchrun the same command runs on many ranks. A run folder that holds checkpoints resumes.
"""

import os
import sys

from ring_train.config import Config, compose
from ring_train.jobs.run_length import with_num_steps
from ring_train.plan import make_plan
from ring_train.runtime.errors import STOPPED_STATUS, run_job
from ring_train.runtime.signals import SIGNALS


def main(overrides: list[str]) -> None:
    """Run the pretraining job that the overrides describe."""
    pretrain(compose("pretrain", overrides))


def pretrain(config: Config) -> None:
    """Plan, build, resume or initialise, and train to the end, or until a signal or the deadline.

    A run that was stopped ends this process with status 75: starting it again goes on.
    """
    SIGNALS.install()
    plan = make_plan(with_num_steps(config), int(os.environ.get("WORLD_SIZE", "1")))

    import ring_train.platform  # noqa: F401  (heavy imports only after the plan holds)
    from ring_train.checkpoint.checkpointer import Checkpointer
    from ring_train.data.loader import build_batches
    from ring_train.data.mixture import check_same_samples
    from ring_train.jobs.initial_weights import (
        check_initial_weights,
        check_same_start,
        load_initial_weights,
    )
    from ring_train.model.build import build_model
    from ring_train.resilience.attempt import start_attempt
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.answers import AnswerEvaluation
    from ring_train.train.components import Components
    from ring_train.train.loop import Trainer
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.plots import write_plots
    from ring_train.train.questions import read_questions
    from ring_train.train.record import write_run_record

    with start_runtime(plan) as groups, start_attempt(plan, groups) as attempt:
        checkpoints = Checkpointer(plan, groups.collection)
        if config.resilience.resume_from_previous:
            for folder in checkpoints.settle():
                attempt.tell("damaged_checkpoint", folder=str(folder))
        is_new_run = checkpoints.is_new_run()
        if is_new_run:
            check_initial_weights(plan)
        else:
            check_same_start(plan)
        questions = read_questions(plan) if config.evaluation.interval_steps else None
        batches = build_batches(plan)
        model = build_model(plan, groups.collection)
        if is_new_run:
            load_initial_weights(plan, model, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        state = checkpoints.restore_or_init(model, optimizer)
        check_same_samples(state.mixture, batches.mixture_record(), state.consumed_samples)
        write_run_record(plan, batches, groups.rank)
        attempt.tell("init" if is_new_run else "resume", step=state.step)
        answers = AnswerEvaluation(plan, model, groups, questions) if questions else None
        parts = Components(model, optimizer, batches, checkpoints, answers)
        trainer = Trainer(plan, parts, groups, attempt)
        trainer.train(state)
        if not trainer.must_go_on:  # pictures take seconds that a stopped job may not have
            write_plots(plan, groups.rank)
    if trainer.must_go_on:
        sys.exit(STOPPED_STATUS)


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
