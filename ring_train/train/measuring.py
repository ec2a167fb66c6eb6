"""Validation and evaluation of a run, at their steps, and again if a stop fell into them."""

from __future__ import annotations

import json
import time

from ring_train.plan import Plan
from ring_train.resilience.attempt import Attempt
from ring_train.resilience.time_account import TimeAccount
from ring_train.runtime.distributed import Groups
from ring_train.runtime.signals import SIGNALS
from ring_train.train.components import Components
from ring_train.train.evaluation import evaluate
from ring_train.train.judged_step import Abandoned
from ring_train.train.optimizer import gather_parameters
from ring_train.train.reporting import Reporter


class Measurements:
    """Runs what falls on a step. Collective over all ranks.

    Args:
        plan: the plan of the run.
        parts: what is measured, on what.
        groups: process groups and ranks.
        attempt: this start of the run.
        reporter: receives the figures.
        account: where the time goes.
    """

    def __init__(
        self,
        plan: Plan,
        parts: Components,
        groups: Groups,
        attempt: Attempt,
        reporter: Reporter,
        account: TimeAccount,
    ) -> None:
        self.plan, self.parts, self.groups = plan, parts, groups
        self.attempt, self.reporter, self.account = attempt, reporter, account

    def run(self, step: int) -> None:
        """Run the validation and the evaluation that fall on a step or on the end.

        Raises:
            Abandoned: a rank was told to stop; the measurement will be run again.
        """
        self._run(step, validate=True, answer=True)

    def run_again(self, step: int) -> None:
        """Run what the last start of the run was stopped in; raises as `run` does."""
        if step:
            is_first = self.groups.rank == 0
            missing = [
                is_first and not self._has_record(name, step)
                for name in ("validation", "evaluation")
            ]
            validate, answer = map(bool, self.groups.agreement.worst(missing))
            self._run(step, validate=validate, answer=answer)

    def _has_record(self, name: str, step: int) -> bool:
        path = self.attempt.run_dir / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return bool(lines) and json.loads(lines[-1])["step"] >= step

    def _run(self, step: int, *, validate: bool, answer: bool) -> None:
        config = self.plan.config
        is_last = step == config.train.num_steps
        if validate and _is_due(step, config.train.eval_interval_steps, is_last=is_last):
            self._validate(step)
        if answer and _is_due(step, config.evaluation.interval_steps, is_last=is_last):
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        if self.parts.answers is None:
            return
        started = time.monotonic()
        self.attempt.at("evaluate", step)
        gather_parameters(self.parts.model)
        with self.account.spend("evaluate"):
            result = self.parts.answers.run()
        seconds = time.monotonic() - started
        self.reporter.pause(seconds)
        self.reporter.evaluation(step, result, seconds)

    def _validate(self, step: int) -> None:
        started = time.monotonic()

        def before_each() -> None:
            self.attempt.at("validate", step)
            if self.groups.agreement.any(SIGNALS.name is not None):
                raise Abandoned

        model, batches = self.parts.model, self.parts.batches
        gather_parameters(model)
        with self.account.spend("validate"):
            losses = evaluate(model, batches, self.groups, step - 1, before_each)
        self.reporter.pause(time.monotonic() - started)
        self.reporter.validation(step, losses)


def _is_due(step: int, interval: int, *, is_last: bool) -> bool:
    return interval > 0 and (is_last or step % interval == 0)
