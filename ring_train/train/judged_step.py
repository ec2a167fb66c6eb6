"""A step whose figures all ranks judge together before it changes anything."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from ring_train.data.batch import Batch
from ring_train.plan import Plan
from ring_train.resilience.attempt import Attempt
from ring_train.resilience.policy import CODES, Cause, Decision, Figures, Troubles, decide, judge
from ring_train.runtime.distributed import Groups
from ring_train.runtime.signals import SIGNALS
from ring_train.train.step import (
    LossSums,
    StepResult,
    apply_gradients,
    compute_gradients,
    gradient_norm,
)


class Abandoned(Exception):
    """All ranks agreed to stop within a step or a validation; nothing of the run has changed."""


@dataclass(frozen=True)
class Verdict:
    """What became of a step: its result, or what was decided instead."""

    result: StepResult | None
    decision: Decision | None


class JudgedSteps:
    """Runs steps under the fault policy.

    Args:
        plan: the plan of the run.
        model: wrapped model chunks of this rank.
        optimizer: megatron's optimizer over them.
        groups: process groups and ranks.
        attempt: the journal, and the faults to inject.
    """

    def __init__(
        self,
        plan: Plan,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        groups: Groups,
        attempt: Attempt,
    ) -> None:
        self.plan, self.model, self.optimizer = plan, model, optimizer
        self.groups, self.attempt = groups, attempt
        self.policy = plan.config.resilience
        kept = self.policy.spike_window_steps if self.policy.spike_sigma is not None else 0
        self.recent: deque[Figures] = deque(maxlen=kept)
        """Of the last updates."""
        self.first_bad: int | None = None
        """Number of the first bad step since the last update or roll-back."""
        self.in_a_row = 0
        """Bad steps since then."""

    def forget(self, recent: Sequence[Sequence[float]]) -> None:
        """Go on from a restored state, whose last figures these are."""
        self.recent.clear()
        self.recent.extend((loss, norm) for loss, norm in recent)
        self._end_row()

    def run(self, micro_batches: Sequence[Batch], *, step: int, num_domains: int) -> Verdict:
        """Run a step (0-based), or decide that it is passed over. Collective over all ranks.

        Raises:
            Abandoned: a rank was told to stop in the middle of it.
        """
        number, reruns = step + 1, 0
        while True:
            sums, norm = self._compute(micro_batches, number, num_domains)
            figures = (float(sums.lm_loss), norm)
            cause = self._agree(judge(figures, tuple(self.recent), self.policy))
            if cause is None:
                self.attempt.at("update", number)
                self.recent.append(figures)
                self._end_row()
                groups = self.groups.collection
                result = apply_gradients(
                    self.plan, self.model, self.optimizer, groups, step=step, sums=sums
                )
                return Verdict(result, None)
            troubles = Troubles(reruns, self.in_a_row, self.attempt.roll_backs)
            decision = decide(troubles, self.policy)
            self._tell(number, cause, figures, decision)
            if decision is not Decision.rerun:
                self.first_bad = self.first_bad or number
                self.in_a_row += 1
                return Verdict(None, decision)
            reruns += 1

    def _end_row(self) -> None:
        self.first_bad, self.in_a_row = None, 0

    def _compute(
        self, micro_batches: Sequence[Batch], number: int, num_domains: int
    ) -> tuple[LossSums, float]:
        """Leave gradients in the buffers; return the sums of the losses and the gradient norm."""
        sums = compute_gradients(
            self.plan,
            self.model,
            self.optimizer,
            micro_batches,
            self.groups.collection,
            num_domains=num_domains,
            before_each=self._before_micro_batch(number, len(micro_batches)),
        )
        self.groups.agreement.settle()
        self.attempt.at("optimizer", number)
        factor = self.attempt.faults.gradient_factor(number)
        if factor is not None:
            _scale_gradients(self.model, factor)
        return sums, gradient_norm(self.optimizer)

    def _before_micro_batch(self, number: int, count: int) -> Callable[[], None]:
        """Return what is done before each micro batch of a step.

        Where a step has several, ranks agree on the way whether one was told to stop: a step of
        minutes must not cost the checkpoint of a job that has seconds left. Chunks of an
        interleaved pipeline run in an order of their own, so there the step is finished first.
        """
        agree = count > 1 and self.plan.mesh.vpp == 1
        self.groups.agreement.begin(count)

        def begin() -> None:
            self.attempt.at("forward", number)
            if agree and self.groups.agreement.ask_ahead(SIGNALS.name is not None):
                self.groups.agreement.settle()
                raise Abandoned

        return begin

    def _agree(self, cause: Cause | None) -> Cause | None:
        """Return the worst of what any rank found."""
        code = self.groups.agreement.worst([CODES.index(cause)])[0]
        return CODES[code]

    def _tell(self, number: int, cause: Cause, figures: Figures, decision: Decision) -> None:
        loss, norm = figures
        self.attempt.tell(
            "bad_step",
            step=number,
            cause=cause.value,
            lm_loss=_json(loss),
            grad_norm=_json(norm),
            decision=decision.value,
        )
        self.attempt.warn(
            "step %d is bad (%s): lm_loss %.4g, grad_norm %.4g; %s",
            *(number, cause, loss, norm, _WORDS[decision]),
        )


_WORDS = {
    Decision.rerun: "it is computed again",
    Decision.skip: "its data is passed over, and nothing is updated",
    Decision.roll_back: "the run rolls back to a checkpoint from before",
    Decision.stop: "the run stops",
}


def _json(value: float) -> float | str:
    """Return what JSON has for a figure: it knows no NaN."""
    return value if math.isfinite(value) else repr(value)


def _scale_gradients(model: list[DistributedDataParallel], factor: float) -> None:
    """Multiply all gradients of this rank."""
    chunks: list[Any] = [*model]  # nn.Module declares what DDP calls its buffers
    for chunk in chunks:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            buffer.grad_data.mul_(factor)
