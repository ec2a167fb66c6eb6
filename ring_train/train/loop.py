"""The training loop: step, log, validate, save, and stop where it must.

After every step all ranks agree on whether to stop and whether a save has failed, so that none of
them is left waiting for one that does otherwise.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from ring_train.checkpoint import TrainState
from ring_train.checkpoint.ranks import from_rank_0
from ring_train.data.batch import Batch
from ring_train.data.ledger import Ledger, count_tokens, ledger_array, make_ledger
from ring_train.errors import UserError
from ring_train.model.build import enter_phase
from ring_train.plan import Phase, Plan
from ring_train.resilience.attempt import Attempt
from ring_train.resilience.outcome import State
from ring_train.resilience.policy import Decision
from ring_train.resilience.time_account import TimeAccount
from ring_train.runtime.distributed import Groups
from ring_train.runtime.logs import progress_bar
from ring_train.runtime.signals import SIGNALS
from ring_train.train.components import Components
from ring_train.train.judged_step import Abandoned, JudgedSteps
from ring_train.train.measuring import Measurements
from ring_train.train.reporting import Reporter
from ring_train.train.saving import PatientSaves

logger = logging.getLogger(__name__)

STOPS = ("", "train.time_limit_s", "deadline", "signal")
"""Reasons to stop by their number in the agreement of ranks."""


class Trainer:
    """What one run needs at every step; `train` drives it.

    Args:
        plan: the plan of the run.
        parts: what is trained, on what, and where it is kept.
        groups: process groups and ranks.
        attempt: this start of the run.
    """

    def __init__(self, plan: Plan, parts: Components, groups: Groups, attempt: Attempt) -> None:
        self.plan, self.parts, self.groups, self.attempt = plan, parts, groups, attempt
        self.model, self.optimizer = parts.model, parts.optimizer
        self.steps = JudgedSteps(plan, parts.model, parts.optimizer, groups, attempt)
        self.account = TimeAccount()
        domains = parts.batches.domains
        self.reporter = Reporter(plan, groups, attempt, domains, self.account)
        self.measurements = Measurements(plan, parts, groups, attempt, self.reporter, self.account)
        self.saves = PatientSaves(
            parts.checkpoints,
            parts.model,
            parts.optimizer,
            attempt,
            groups.agreement,
            self.account,
        )
        self.phase: Phase | None = None
        self.tokens_read = np.zeros((len(plan.phases), len(domains)), dtype=np.int64)
        """By this data-parallel rank, since the run was started, resumed or rolled back."""
        self.stopped: str | None = None
        """What stopped the run; None = it went as far as its steps."""
        self._stop_at = time.monotonic()
        self._limit = time.monotonic() + (plan.config.train.time_limit_s or float("inf"))

    def train(self, state: TrainState) -> TrainState:
        """Train from `state` to the end of the plan, its step or time limit, or a stop; say where.

        A checkpoint is saved at every interval and whenever the loop ends. Collective.

        Raises:
            CheckpointError: the disk failed for longer than `resilience.io_patience_s`.
            UserError: the records of the run could not be written for so long, or step after step
                was bad.
        """
        config = self.plan.config
        last = min(config.train.num_steps, config.train.stop_after_step or config.train.num_steps)
        state = replace(state, mixture=self.parts.batches.mixture_record())
        self._begin(state)
        self.attempt.tell("ready", step=state.step, seconds=time.monotonic() - self.attempt.began)
        self.account.take()
        if self.attempt.watchdog is not None:
            self.attempt.watchdog.start()
        bar = progress_bar(
            first_step=state.step,
            num_steps=last,
            wanted=config.logging.progress,
            rank=self.groups.rank,
        )
        with SIGNALS.deferred(), bar:
            state = self._train(state, last, bar)
            self._end(state, last)
        if self.attempt.watchdog is not None:
            self.attempt.watchdog.stop()  # what follows, pictures for one, waits for nobody
        return state

    @property
    def must_go_on(self) -> bool:
        """Return whether a signal or the deadline has stopped the run before its end."""
        return self.stopped not in (None, "train.time_limit_s")

    def _train(self, state: TrainState, last: int, bar: tqdm) -> TrainState:
        """Run steps until the end or a stop; return where."""
        try:
            self.measurements.run_again(state.step)
            while state.step < last and not self._must_stop(state):
                began, before = time.monotonic(), state.step
                state = self._step(state)
                bar.n = state.step
                bar.update(0)
                if state.step > before:
                    self.measurements.run(state.step)
                    if _falls_on(state.step, self.plan.config.checkpoint.interval_steps):
                        self._save(state)
                self.attempt.deadline.note_step(time.monotonic() - began)
        except Abandoned:
            # What was under way has changed nothing: `state` is that after the last whole step.
            self._note_stop("signal")
        return state

    def _end(self, state: TrainState, last: int) -> None:
        """Save, wait for the disk, and tell how this start of the run ended."""
        self.attempt.at("stop", state.step)
        self._save(state)
        self.saves.finish(replace(state, ledger=self._ledger()))
        self.reporter.progress(state.step, self._tokens(state.step))
        self.reporter.end()
        is_done = state.step >= self.plan.config.train.num_steps
        if self.stopped is None:
            reason = "all steps are done" if is_done else "train.stop_after_step"
            self.attempt.tell("finish" if is_done else "stop", step=state.step, reason=reason)
            self.attempt.end(State.finished, state.step, reason)
            return
        seconds = round(time.monotonic() - self._stop_at, 3)
        self.attempt.tell("stop", step=state.step, reason=self.stopped, seconds=seconds)
        ended = State.stopped if self.must_go_on else State.finished
        self.attempt.end(ended, state.step, self.stopped)
        logger.info(
            "stopped by %s after step %d of %d; saved %.1f s later",
            *(self.stopped, state.step, last, seconds),
        )

    def _begin(self, state: TrainState) -> None:
        """Take up a state that was restored, or the first one."""
        self.resumed_ledger = state.ledger
        self.tokens_read[:] = 0
        self.phase = None
        self.attempt.skipped.update(state.skipped_steps)
        self.steps.forget(state.recent)
        self.reporter.begin(state.step)

    def _step(self, state: TrainState) -> TrainState:
        """Run one step, or pass over it, with the logging and validation that fall on it."""
        config = self.plan.config
        at = self.plan.at(state.step)
        number = state.step + 1
        self._enter(at.phase)
        self.reporter.before(number)
        self.attempt.at("data", number)
        with self.account.spend("data"):
            micro_batches = self._read(state.step)
        result = None
        if number not in self.attempt.skipped:
            with self.account.spend("step"):
                verdict = self.steps.run(
                    [batch.to(self.groups.device) for batch in micro_batches],
                    step=state.step,
                    num_domains=len(self.parts.batches.domains),
                )
            result = verdict.result
            self.reporter.after(number)
            if verdict.decision in (Decision.roll_back, Decision.stop):
                return self._roll_back(state, number, verdict.decision)
        self.tokens_read[self.plan.phases.index(at.phase)] += count_tokens(
            micro_batches, len(self.parts.batches.domains)
        )
        state = self._after(state, number, is_updated=result is not None)
        if _falls_on(number, config.logging.interval_steps) or number == config.train.num_steps:
            self.attempt.at("log", number)
            ledger = self._ledger()
            if result is not None:
                self.reporter.step(result, number, at, ledger)
            self.reporter.progress(number, self._tokens(state.step))
        return state

    def _after(self, state: TrainState, number: int, *, is_updated: bool) -> TrainState:
        """Return the state after a step that was run or passed over."""
        skipped = state.skipped_steps
        if not is_updated:
            self.attempt.skipped.add(number)
            skipped = [*skipped, number]
        at = self.plan.at(number - 1)
        return replace(
            state,
            step=number,
            consumed_samples=at.first_sample + at.global_batch_size,
            skipped_steps=skipped,
            recent=[list(figures) for figures in self.steps.recent],
        )

    def _read(self, step: int) -> list[Batch]:
        """Return this rank's micro batches of a step (0-based)."""
        return [
            self.parts.batches.batch(step, index, self.groups.dp_rank)
            for index in range(self.plan.at(step).num_micro_batches)
        ]

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

    def _roll_back(self, state: TrainState, number: int, decision: Decision) -> TrainState:
        """Return to a checkpoint from before the trouble, whose data is passed over from now on."""
        first = self.steps.first_bad or number
        policy = self.plan.config.resilience
        if decision is Decision.stop:
            raise UserError(
                f"steps {first} to {number} are bad after {self.attempt.roll_backs} roll-backs "
                f"(resilience.max_roll_backs={policy.max_roll_backs}); journal.jsonl tells which "
                "and why: mend the data or the learning rate, or raise max_roll_backs, and start "
                "the run again"
            )
        self.saves.settle()
        target = self.parts.checkpoints.newest_within(first - 1)
        self.attempt.tell(
            "roll_back",
            step=number,
            from_step=state.step,
            to_step=target,
            skipped=[first, number],
        )
        self.attempt.at("roll_back", number)
        with self.account.spend("roll_back"):
            restored = self.parts.checkpoints.roll_back(target, self.model, self.optimizer)
        self.attempt.tell("rolled_back", step=target)
        self.attempt.roll_backs += 1
        self.attempt.skipped |= set(range(first, number + 1))
        self._begin(restored)
        return replace(restored, mixture=state.mixture)

    def _must_stop(self, state: TrainState) -> bool:
        """Return whether all ranks stop here; first save again what a disk has refused."""
        stop = STOPS.index("signal") if SIGNALS.name else 0
        is_stuck = False
        if self.groups.rank == 0:
            if not stop and self.attempt.deadline.is_near():
                stop = STOPS.index("deadline")
            if not stop and time.monotonic() > self._limit:
                stop = STOPS.index("train.time_limit_s")
            failing = self.attempt.lines.failing_since
            patience_s = self.plan.config.resilience.io_patience_s
            is_stuck = failing is not None and time.monotonic() - failing > patience_s
        has_failed = self.parts.checkpoints.has_failed()
        stop, is_stuck, has_failed = self.groups.agreement.worst([stop, is_stuck, has_failed])
        if is_stuck:
            self._give_up_writing()
        if stop:
            self._note_stop(STOPS[stop])
        elif has_failed:
            self._save(state)
        return bool(stop)

    def _note_stop(self, reason: str) -> None:
        """Remember why the run stops, and since when it should."""
        self.stopped = reason
        self._stop_at = SIGNALS.received_at if SIGNALS.name else time.monotonic()
        if reason == "signal":
            self.stopped = from_rank_0(lambda: SIGNALS.name or "a signal to another rank")
        self.attempt.tell("stop_request", reason=self.stopped)

    def _give_up_writing(self) -> None:
        """End the run because its records cannot be written."""
        problem = from_rank_0(lambda: self.attempt.lines.problem)
        raise UserError(
            f"{problem}, for longer than resilience.io_patience_s="
            f"{self.plan.config.resilience.io_patience_s:g}; make room or repair the disk and "
            "start the run again: it goes on from its newest checkpoint"
        )

    def _save(self, state: TrainState) -> None:
        """Begin a checkpoint of this state."""
        self.saves.save(replace(state, ledger=self._ledger()))

    def _ledger(self) -> Ledger:
        """Return the tokens read since the run began. Collective over data-parallel ranks."""
        read = torch.from_numpy(self.tokens_read).to(self.groups.device, copy=True)
        torch.distributed.all_reduce(read, group=self.groups.collection.dp)
        phases, domains = self.plan.phases, self.parts.batches.domains
        before = ledger_array(phases, domains, self.resumed_ledger)
        return make_ledger(phases, domains, read.cpu().numpy() + before)

    def _tokens(self, step: int) -> int:
        """Return the tokens, padding included, of the first steps."""
        if step == 0:
            return 0
        at = self.plan.at(step - 1)
        before = (p.num_tokens for p in self.plan.phases if p.first_step < at.phase.first_step)
        samples = at.first_sample + at.global_batch_size - at.phase.first_sample
        return sum(before) + samples * at.phase.batch.seq_length


def _falls_on(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
