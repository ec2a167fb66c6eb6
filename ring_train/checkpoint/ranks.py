"""Agreement of all ranks: what fails on one rank is raised on every rank."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from ring_train.checkpoint.errors import CheckpointError, DamagedCheckpoint
from ring_train.errors import UserError


def on_all_ranks[T](function: Callable[[], T]) -> T:
    """Return what `function` returns on this rank, if it succeeds on all ranks.

    Collective over the whole world.

    Raises:
        CheckpointError: with the message of the first rank on which it failed.
    """
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    raise_first(None if failure is None else str(failure) or repr(failure), failure)
    return result  # pyrefly: ignore[bad-return]  # set, or raised above


def raise_first(problem: str | None, cause: Exception | None = None) -> None:
    """Raise a CheckpointError on every rank if one has a problem. Collective over the world.

    A DamagedCheckpoint, if that is what the first rank with a problem found.
    """
    problems: list[tuple[str, bool] | None] = [None] * dist.get_world_size()
    mine = None if problem is None else (problem, isinstance(cause, DamagedCheckpoint))
    dist.all_gather_object(problems, mine)
    found = next(filter(None, problems), None)
    if cause is not None and not isinstance(cause, (UserError, OSError)):
        raise cause
    if found:
        message, is_damaged = found
        raise (DamagedCheckpoint if is_damaged else CheckpointError)(message) from cause


def from_rank_0[T](function: Callable[[], T]) -> T:
    """Return on every rank what `function` returns on rank 0, which alone calls it.

    Collective over the whole world.

    Raises:
        CheckpointError: with the message of what it raised.
    """
    answer: list[T | None] = [None]

    def call() -> None:
        if dist.get_rank() == 0:
            answer[0] = function()

    on_all_ranks(call)
    dist.broadcast_object_list(answer, src=0)
    return answer[0]  # pyrefly: ignore[bad-return]  # rank 0 has set it
