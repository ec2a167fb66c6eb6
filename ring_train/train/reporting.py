"""What a run tells while it trains: records, log lines, and where the time went."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from ring_train.checkpoint.ranks import from_rank_0
from ring_train.data.ledger import Ledger
from ring_train.plan import Plan, StepPlan
from ring_train.resilience.attempt import Attempt
from ring_train.resilience.time_account import TimeAccount
from ring_train.runtime.distributed import Groups
from ring_train.train.answer_figures import figures_line
from ring_train.train.answers import EvaluationResult, write_answers
from ring_train.train.metrics import MetricsWriter, answers_path, load_figures, step_metrics
from ring_train.train.profiling import StepProfiler
from ring_train.train.step import StepResult
from ring_train.train.stragglers import StepTimes
from ring_train.train.trackers import Trackers

logger = logging.getLogger(__name__)

LOADS_RECORDS = 200
"""About so many loads of all experts are recorded over a run: they are large."""


class Reporter:
    """Writes the records of a run on rank 0; its methods are called on all ranks.

    Args:
        plan: the plan of the run.
        groups: process groups and ranks.
        attempt: the journal, and the disk's patience.
        domains: names of the domains.
        account: where the time goes.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Groups,
        attempt: Attempt,
        domains: tuple[str, ...],
        account: TimeAccount,
    ) -> None:
        self.plan, self.groups, self.attempt = plan, groups, attempt
        self.domains, self.account = domains, account
        self.writer: MetricsWriter | None = None
        self.times = StepTimes(groups.device) if plan.config.logging.stragglers else None
        self.profiler: StepProfiler | None = None
        self.trackers: Trackers | None = None
        self.logged_at, self.logged_step = time.monotonic(), 0
        interval = plan.config.logging.interval_steps
        self.loads_interval = interval * max(
            1, plan.config.train.num_steps // (LOADS_RECORDS * interval)
        )

    def begin(self, step: int) -> None:
        """Go on after `step` steps; records past it are no more."""
        self.logged_at, self.logged_step = time.monotonic(), step
        if self.profiler is None:
            self.profiler = StepProfiler(self.plan, self.groups, step)
            from_rank_0(self._open_trackers)
        if self.groups.rank == 0:
            if self.writer is not None:
                self.writer.close()
            self.writer = MetricsWriter(
                Path(self.plan.config.run_dir),
                done_steps=step,
                tensorboard=self.plan.config.logging.tensorboard,
                lines=self.attempt.lines,
                trackers=self.trackers,
            )

    def _open_trackers(self) -> None:
        self.trackers = Trackers(self.plan)

    def before(self, step: int) -> None:
        """Watch a step from here, its data included."""
        if self.profiler is not None and self.profiler.steps is not None:
            with self.account.spend("profile"):
                self.profiler.before(step)
        if self.times is not None:
            self.times.begin()

    def after(self, step: int) -> None:
        """Watch a step no further."""
        if self.times is not None:
            self.times.end()
        if self.profiler is not None and self.profiler.steps is not None:
            with self.account.spend("profile"):
                self.profiler.after(step)

    def pause(self, seconds: float) -> None:
        """Leave seconds out of the speed of training."""
        self.logged_at += seconds

    def step(self, result: StepResult, step: int, at: StepPlan, ledger: Ledger) -> None:
        """Tell of a step. Collective over the pipeline group."""
        loads = _all_stages(load_figures(result), self.groups)
        counts = None
        if step % self.loads_interval == 0:
            mine = {number: load.counts.tolist() for number, load in result.loads.items()}
            counts = _all_stages(mine, self.groups)
        self._own_times(step)
        if self.writer is None:
            return
        samples = at.first_sample + at.global_batch_size
        self.writer.write_ledger(step, samples, at.phase.name, ledger)
        if counts:
            self.writer.write_loads(step, counts)
        record = step_metrics(result, self.domains, loads)
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

    def _own_times(self, step: int) -> None:
        """Tell which ranks were slow, and take a request for a profile. Collective."""
        if self.profiler is not None:
            self.profiler.take_request(step)
        if self.times is None:
            return
        seconds = self.times.gather(self.groups.agreement.group)
        if self.writer is not None:
            self.writer.write_step_times(step, seconds)

    def progress(self, step: int, tokens: int) -> None:
        """Tell the journal how far the run is, and where the time since the last call went."""
        self.attempt.tell("progress", step=step, tokens=tokens, seconds=self.account.take())

    def validation(self, step: int, losses: dict[str, float]) -> None:
        """Tell of a validation."""
        if self.writer is not None:
            self.writer.write("validation", step, losses)
            self.writer.show_loads(step)
            figures = "  ".join(f"{key} {value:.4f}" for key, value in losses.items())
            logger.info("step %d  %s", step, figures)

    def evaluation(self, step: int, result: EvaluationResult, seconds: float) -> None:
        """Tell of an evaluation by answers."""
        if self.writer is not None:
            # Answers first: a record says that they are there.
            write_answers(answers_path(self.writer.run_dir, step), result.answers)
            self.writer.write("evaluation", step, result.record())
            logger.info("step %d  %s  (%.0f s)", step, figures_line(result.figures), seconds)

    def end(self) -> None:
        """Close what is open."""
        if self.profiler is not None:
            self.profiler.end()
        if self.writer is not None:
            self.writer.close()
        if self.trackers is not None:
            self.trackers.finish()


def _all_stages[T](figures: dict[int, T], groups: Groups) -> dict[int, T]:
    """Return the figures of all pipeline stages. Collective over the pipeline group."""
    group = groups.collection.pp
    if group.size() == 1:
        return figures
    gathered: list[dict[int, T]] = [{} for _ in range(group.size())]
    torch.distributed.all_gather_object(gathered, figures, group=group)
    return {number: load for stage in gathered for number, load in stage.items()}
