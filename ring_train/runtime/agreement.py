"""Ranks that agree on what to do next, over a group that carries nothing else.

The group is gloo's, on the CPU, also where tensors travel by NCCL: an agreement waits for no
kernel, and works while a step is under way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist


class Agreement:
    """What all ranks of a group think, taken at its worst.

    Args:
        group: a gloo group of all ranks.
        lag: how many questions `ask_ahead` may be ahead of the answer.
    """

    def __init__(self, group: dist.ProcessGroup, lag: int = 1) -> None:
        self.group, self.lag = group, lag
        self._asked: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def worst(self, values: Sequence[int]) -> list[int]:
        """Return the largest of each value over all ranks. Collective."""
        if self.group.size() == 1:
            return [int(value) for value in values]
        tensor = torch.tensor([int(value) for value in values], dtype=torch.int64, device="cpu")
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def any(self, value: bool) -> bool:
        """Return whether it is true on any rank. Collective."""
        return bool(self.worst([value])[0])

    def ask_ahead(self, value: bool) -> bool:
        """Return whether any rank said true `lag` calls ago; the answer is the same on all ranks.

        Between two calls the question travels while the rank computes, so ranks of a pipeline may
        be `lag` calls apart and nobody waits.
        """
        if self.group.size() == 1:
            return value
        tensor = torch.tensor([int(value)], dtype=torch.int64, device="cpu")
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        if work is not None:
            self._asked.append((work, tensor))
        return self._answer() if len(self._asked) > self.lag else False

    def settle(self) -> None:
        """Wait for the questions under way, so that the next ones begin even. Collective."""
        while self._asked:
            self._answer()

    def _answer(self) -> bool:
        work, tensor = self._asked.popleft()
        work.wait()
        return bool(tensor[0])
