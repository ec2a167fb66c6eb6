"""The training loop: step, log, validate, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from ring_train.checkpoint import Checkpointer, TrainState
from ring_train.data.batch import Batch
from ring_train.data.loader import Batches
from ring_train.plan import Plan
from ring_train.runtime.distributed import Groups
from ring_train.runtime.logs import progress_bar
from ring_train.train.evaluation import evaluate
from ring_train.train.metrics import MetricsWriter, load_figures, step_metrics
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
    """

    def __init__(
        self,
        plan: Plan,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        batches: Batches,
        checkpoints: Checkpointer,
        groups: Groups,
    ) -> None:
        self.plan, self.model, self.optimizer = plan, model, optimizer
        self.batches, self.checkpoints, self.groups = batches, checkpoints, groups
        self.writer: MetricsWriter | None = None
        self.logged_at, self.logged_step = time.monotonic(), 0

    def train(self, state: TrainState) -> TrainState:
        """Train from `state` to the end of the plan, its step limit or time limit; return where.

        A checkpoint is saved at every interval and whenever the loop ends. Collective.
        """
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
        self.checkpoints.save(state, self.model, self.optimizer)
        if self.writer is not None:
            self.writer.close()
        return state

    def _step(self, state: TrainState) -> TrainState:
        """Run one step with the logging, validation and saving that fall on it."""
        config = self.plan.config
        result = train_step(
            self.plan,
            self.model,
            self.optimizer,
            self._micro_batches(state.step),
            self.groups.collection,
            step=state.step,
            num_domains=len(self.batches.domains),
        )
        state = replace(
            state,
            step=state.step + 1,
            consumed_samples=state.consumed_samples + config.train.global_batch_size,
        )
        is_last = state.step == config.train.num_steps
        if state.step % config.logging.interval_steps == 0 or is_last:
            self._log(result, state.step)
        if _falls_on(state.step, config.train.eval_interval_steps) or (
            is_last and config.train.eval_interval_steps
        ):
            self._validate(state.step)
        if _falls_on(state.step, config.checkpoint.interval_steps):
            self.checkpoints.save(state, self.model, self.optimizer)
        return state

    def _micro_batches(self, step: int) -> Sequence[Batch]:
        return [
            self.batches.batch(step, index, self.groups.dp_rank).to(self.groups.device)
            for index in range(self.plan.batch.num_micro_batches)
        ]

    def _log(self, result: StepResult, step: int) -> None:
        loads = _all_stages(load_figures(result), self.groups)
        if self.writer is None:
            return
        record = step_metrics(result, self.batches.domains, loads)
        self.writer.write("metrics", step, record)
        now = time.monotonic()
        step_s = (now - self.logged_at) / max(step - self.logged_step, 1)
        self.logged_at, self.logged_step = now, step
        tokens_per_s = self.plan.batch.tokens_per_step / step_s
        flops_per_s = tokens_per_s * self.plan.cost.flops_per_token
        self.writer.write(
            "timing",
            step,
            {"step_s": step_s, "tokens_per_s": tokens_per_s, "model_flops_per_s": flops_per_s},
        )
        logger.info(
            "step %d/%d  lm_loss %.4f  mtp_loss %.4f  grad_norm %.3f  lr %.3g  %.0f tokens/s",
            step,
            self.plan.config.train.num_steps,
            record["lm_loss"],
            record.get("mtp_loss/1", 0.0),
            record["grad_norm"],
            record["learning_rate"],
            tokens_per_s,
        )

    def _validate(self, step: int) -> None:
        started = time.monotonic()
        losses = evaluate(self.model, self.batches, self.groups)
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
