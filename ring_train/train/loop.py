"""The training loop: step, log, validate, save."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from ring_train.checkpoint import TrainState
from ring_train.checkpoint.checkpointer import Checkpointer
from ring_train.data.ledger import Ledger, count_tokens, ledger_array, make_ledger
from ring_train.data.loader import Batches
from ring_train.model.build import enter_phase
from ring_train.plan import Phase, Plan, StepPlan
from ring_train.runtime.distributed import Groups
from ring_train.runtime.logs import progress_bar
from ring_train.train.answer_figures import figures_line
from ring_train.train.answers import AnswerEvaluation, write_answers
from ring_train.train.evaluation import evaluate
from ring_train.train.metrics import MetricsWriter, answers_path, load_figures, step_metrics
from ring_train.train.optimizer import gather_parameters
from ring_train.train.step import StepResult, train_step

logger = logging.getLogger(__name__)


class Trainer:
    """What one run needs at every step; `train` drives it.

    Args:
        plan: the plan of the run.
        model: wrapped model chunks of this rank.
        optimizer: megatron's optimizer over them.
        batches: the data stream.
        checkpoints: where to save.
        groups: process groups and ranks.
        answers: the evaluation by generated answers; None = there is none.
    """

    def __init__(
        self,
        plan: Plan,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        batches: Batches,
        checkpoints: Checkpointer,
        groups: Groups,
        answers: AnswerEvaluation | None = None,
    ) -> None:
        self.plan, self.model, self.optimizer = plan, model, optimizer
        self.batches, self.checkpoints, self.groups = batches, checkpoints, groups
        self.answers = answers
        self.writer: MetricsWriter | None = None
        self.logged_at, self.logged_step = time.monotonic(), 0
        self.phase: Phase | None = None
        self.tokens_read = np.zeros((len(plan.phases), len(batches.domains)), dtype=np.int64)
        """By this data-parallel rank, since the run was started or resumed."""

    def train(self, state: TrainState) -> TrainState:
        """Train from `state` to the end of the plan, its step limit or time limit; return where.

        A checkpoint is saved at every interval and whenever the loop ends. Collective.
        """
        state = replace(state, mixture=self.batches.mixture_record())
        self.resumed_ledger = state.ledger
        config = self.plan.config.train
        last = min(config.num_steps, config.stop_after_step or config.num_steps)
        deadline = time.monotonic() + (config.time_limit_s or float("inf"))
        if self.groups.rank == 0:
            self.writer = MetricsWriter(
                Path(self.plan.config.run_dir),
                done_steps=state.step,
                tensorboard=self.plan.config.logging.tensorboard,
            )
        self.logged_at, self.logged_step = time.monotonic(), state.step
        wanted = self.plan.config.logging.progress
        with progress_bar(
            first_step=state.step, num_steps=last, wanted=wanted, rank=self.groups.rank
        ) as bar:
            while state.step < last and not self._expired(deadline):
                state = self._step(state)
                bar.update()
        self._save(state)
        self.checkpoints.finish()
        if self.writer is not None:
            self.writer.close()
        return state

    def _step(self, state: TrainState) -> TrainState:
        """Run one step with the logging, validation and saving that fall on it."""
        config = self.plan.config
        at = self.plan.at(state.step)
        self._enter(at.phase)
        micro_batches = [
            self.batches.batch(state.step, index, self.groups.dp_rank)
            for index in range(at.num_micro_batches)
        ]
        phase_number = self.plan.phases.index(at.phase)
        self.tokens_read[phase_number] += count_tokens(micro_batches, len(self.batches.domains))
        result = train_step(
            self.plan,
            self.model,
            self.optimizer,
            [batch.to(self.groups.device) for batch in micro_batches],
            self.groups.collection,
            step=state.step,
            num_domains=len(self.batches.domains),
        )
        state = replace(
            state,
            step=state.step + 1,
            consumed_samples=at.first_sample + at.global_batch_size,
        )
        is_last = state.step == config.train.num_steps
        if state.step % config.logging.interval_steps == 0 or is_last:
            self._log(result, state, at)
        self._measure(state.step, is_last=is_last)
        if _falls_on(state.step, config.checkpoint.interval_steps):
            self._save(state)
        return state

    def _enter(self, phase: Phase) -> None:
        """Switch to a phase, unless the run is in it."""
        if phase is self.phase:
            return
        if len(self.plan.phases) > 1:
            logger.info(
                "phase %s: steps %d to %d, rows of %d tokens, %d a step",
                *(phase.name, phase.first_step + 1, phase.first_step + phase.num_steps),
                *(phase.batch.seq_length, phase.batch.global_batch_size),
            )
        enter_phase(self.model, phase)
        self.phase = phase

    def _save(self, state: TrainState) -> None:
        state = replace(state, ledger=self._ledger())
        gather_parameters(self.model)
        self.checkpoints.save(state, self.model, self.optimizer)

    def _ledger(self) -> Ledger:
        """Return the tokens read since the run began. Collective over data-parallel ranks."""
        read = torch.from_numpy(self.tokens_read).to(self.groups.device, copy=True)
        torch.distributed.all_reduce(read, group=self.groups.collection.dp)
        phases, domains = self.plan.phases, self.batches.domains
        before = ledger_array(phases, domains, self.resumed_ledger)
        return make_ledger(phases, domains, read.cpu().numpy() + before)

    def _log(self, result: StepResult, state: TrainState, at: StepPlan) -> None:
        loads = _all_stages(load_figures(result), self.groups)
        ledger = self._ledger()
        if self.writer is None:
            return
        step = state.step
        self.writer.write_ledger(step, state.consumed_samples, at.phase.name, ledger)
        record = step_metrics(result, self.batches.domains, loads)
        self.writer.write("metrics", step, record)
        now = time.monotonic()
        step_s = (now - self.logged_at) / max(step - self.logged_step, 1)
        self.logged_at, self.logged_step = now, step
        tokens_per_s = at.tokens / step_s
        flops_per_s = tokens_per_s * self.plan.flops_per_token(at.phase)
        self.writer.write(
            "timing",
            step,
            {"step_s": step_s, "tokens_per_s": tokens_per_s, "model_flops_per_s": flops_per_s},
        )
        logger.info(
            "step %d/%d  lm_loss %.4f%s  grad_norm %.3f  lr %.3g  %.0f tokens/s",
            step,
            self.plan.config.train.num_steps,
            record["lm_loss"],
            f"  mtp_loss {record['mtp_loss/1']:.4f}" if "mtp_loss/1" in record else "",
            record["grad_norm"],
            record["learning_rate"],
            tokens_per_s,
        )

    def _measure(self, step: int, *, is_last: bool) -> None:
        """Run the validation and the evaluation that fall on a step or on the end."""
        validation = self.plan.config.train.eval_interval_steps
        if _falls_on(step, validation) or (is_last and validation):
            self._validate(step)
        evaluation = self.plan.config.evaluation.interval_steps
        if _falls_on(step, evaluation) or (is_last and evaluation):
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        if self.answers is None:
            return
        started = time.monotonic()
        gather_parameters(self.model)
        result = self.answers.run()
        evaluation_s = time.monotonic() - started
        self.logged_at += evaluation_s
        if self.writer is not None:
            # Answers first: a record says that they are there.
            write_answers(answers_path(self.writer.run_dir, step), result.answers)
            self.writer.write("evaluation", step, result.record())
            logger.info("step %d  %s  (%.0f s)", step, figures_line(result.figures), evaluation_s)

    def _validate(self, step: int) -> None:
        started = time.monotonic()
        gather_parameters(self.model)
        losses = evaluate(self.model, self.batches, self.groups, step - 1)
        self.logged_at += time.monotonic() - started
        if self.writer is not None:
            self.writer.write("validation", step, losses)
            figures = "  ".join(f"{key} {value:.4f}" for key, value in losses.items())
            logger.info("step %d  %s", step, figures)

    def _expired(self, deadline: float) -> bool:
        """Return whether rank 0 is past the time limit, the same on every rank."""
        if self.plan.config.train.time_limit_s is None:
            return False
        flag = torch.tensor(time.monotonic() > deadline, device=self.groups.device).long()
        torch.distributed.broadcast(flag, src=0)
        return bool(flag)


def _falls_on(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def _all_stages(
    figures: dict[int, dict[str, float]], groups: Groups
) -> dict[int, dict[str, float]]:
    """Return the figures of all pipeline stages. Collective over the pipeline group."""
    group = groups.collection.pp
    if group.size() == 1:
        return figures
    gathered: list[dict[int, dict[str, float]]] = [{} for _ in range(group.size())]
    torch.distributed.all_gather_object(gathered, figures, group=group)
    return {number: load for stage in gathered for number, load in stage.items()}
