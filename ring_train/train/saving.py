"""Checkpoints of a run on a disk that may be full, slow or away for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from ring_train.checkpoint import CheckpointError, TrainState
from ring_train.checkpoint.checkpointer import Checkpointer
from ring_train.resilience.attempt import Attempt
from ring_train.resilience.time_account import TimeAccount
from ring_train.runtime.agreement import Agreement
from ring_train.train.optimizer import gather_parameters

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 30.0
"""Between tries; doubled each time."""


class PatientSaves:
    """Saves again what a disk has refused, for `resilience.io_patience_s`. Collective throughout.

    Args:
        checkpoints: where to save.
        model: wrapped model chunks of this rank.
        optimizer: megatron's optimizer over them.
        attempt: the journal, and how long to try.
        agreement: of all ranks, on when to give up.
        account: where the time goes.
    """

    def __init__(
        self,
        checkpoints: Checkpointer,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        attempt: Attempt,
        agreement: Agreement,
        account: TimeAccount,
    ) -> None:
        self.checkpoints, self.model, self.optimizer = checkpoints, model, optimizer
        self.attempt, self.agreement, self.account = attempt, agreement, account
        checkpoints.on_saved = self._note_saved

    def save(self, state: TrainState) -> None:
        """Begin a checkpoint.

        Raises:
            CheckpointError: the disk fails for longer than `resilience.io_patience_s`.
        """
        self.attempt.at("save", state.step)
        self.attempt.tell("save_begin", step=state.step)
        gather_parameters(self.model)
        self._patiently(lambda: self._begin(state), state.step)

    def finish(self, state: TrainState) -> None:
        """Wait until the checkpoint of this state is on the disk.

        Raises:
            CheckpointError: the disk fails for longer than `resilience.io_patience_s`.
        """
        tries = 0

        def finish() -> None:
            nonlocal tries
            tries += 1
            self.attempt.at("finish", state.step)
            if tries > 1:
                self._begin(state)
            self.checkpoints.finish()

        self._patiently(finish, state.step)

    def settle(self) -> None:
        """Wait for a save that is under way, whatever becomes of it."""
        try:
            with self.account.spend("save"):
                self.checkpoints.finish()
        except CheckpointError as error:
            self.attempt.tell("save_failed", problem=str(error), tries=1)

    def _begin(self, state: TrainState) -> None:
        self.checkpoints.save(state, self.model, self.optimizer)

    def _patiently(self, action: Callable[[], None], step: int) -> None:
        """Do something with checkpoints, again and again while the disk fails."""
        began, delay_s, tries = time.monotonic(), FIRST_RETRY_S, 0
        patience_s = self.attempt.plan.config.resilience.io_patience_s
        while True:
            try:
                with self.account.spend("save"):
                    action()
                return
            except CheckpointError as error:
                tries += 1
                self.attempt.tell("save_failed", step=step, problem=str(error), tries=tries)
                if self.agreement.any(time.monotonic() - began + delay_s > patience_s):
                    raise
                self.attempt.warn("%s; trying again in %.0f s", error, delay_s)
            with self.account.spend("save"):
                time.sleep(delay_s)
            delay_s = min(2 * delay_s, LONGEST_RETRY_S)

    def _note_saved(self, step: int, seconds: float) -> None:
        self.attempt.deadline.note_save(seconds)
        self.attempt.tell("saved", step=step, seconds=round(seconds, 3))
