"""Processes that share the work on files: no groups of a mesh, no megatron-core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from ring_train.errors import UserError

LONGEST_WAIT = timedelta(hours=12)
"""Of ranks for one that copies or hashes a file of any size; gloo's own 30 minutes are for steps of
training. A rank that dies ends the others through torchrun, whatever this is."""


@dataclass(frozen=True)
class Ranks:
    """This process among those that do the same job."""

    rank: int = 0
    world_size: int = 1

    def agree[T](self, function: Callable[[], T]) -> T:
        """Return what `function` returns here, once it has succeeded on all ranks.

        Collective over all ranks.

        Raises:
            UserError: with the message of the first rank on which it raised one or an OSError.
        """
        result, failure = None, None
        try:
            result = function()
        except Exception as error:
            failure = error
        self._raise_first(failure)
        return result  # pyrefly: ignore[bad-return]  # set, or raised above

    def _raise_first(self, failure: Exception | None) -> None:
        if self.world_size == 1:
            if failure is not None:
                raise failure
            return
        problems: list[str | None] = [None] * self.world_size
        dist.all_gather_object(problems, None if failure is None else str(failure) or repr(failure))
        found = next(filter(None, problems), None)
        if failure is not None and not isinstance(failure, (UserError, OSError)):
            raise failure
        if found:
            raise UserError(found) from failure

    def from_first[T](self, function: Callable[[], T]) -> T:
        """Return on every rank what `function` returns on rank 0, which alone calls it.

        Collective over all ranks; raises as `agree` does.
        """
        answer: list[T | None] = [None]

        def call() -> None:
            if self.rank == 0:
                answer[0] = function()

        self.agree(call)
        if self.world_size > 1:
            dist.broadcast_object_list(answer, src=0)
        return answer[0]  # pyrefly: ignore[bad-return]  # rank 0 has set it


ALONE = Ranks()


@contextmanager
def start_ranks() -> Iterator[Ranks]:
    """Yield this process's place among torchrun's, or ALONE without torchrun.

    Collective over the whole world, over gloo. A process group that is already initialised is used
    and left running.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    owned = not dist.is_initialized()
    if owned:
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)
        # Else a rank that fails at once closes connections that a slower one is still making.
        dist.barrier()
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        if owned:
            dist.destroy_process_group()
