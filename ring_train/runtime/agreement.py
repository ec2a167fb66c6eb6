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
        stages: pipeline ranks.
        stage: pipeline rank of this one, from 0.
    """

    def __init__(self, group: dist.ProcessGroup, *, stages: int = 1, stage: int = 0) -> None:
        self.group, self.stages, self.stage = group, stages, stage
        self._asked: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._count = self._calls = 0

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

    def begin(self, count: int) -> None:
        """Begin a step of so many micro batches, before each of which every rank asks ahead."""
        self._count, self._calls = count, 0

    def ask_ahead(self, value: bool) -> bool:
        """Return whether all ranks end the step here, because one of them said true before.

        Called before the forward of each micro batch. The question travels while ranks compute, and
        nobody waits for a rank that is behind in the pipeline. With P stages, what any rank says
        before micro batch i ends stage p before micro batch i + P - p: in the order of 1F1B each
        stage then has what it receives, and nothing is received that is not sent. True is told only
        if that micro batch exists on the first stage; after it, every rank must `settle`.
        """
        self._calls += 1
        if self.group.size() == 1:
            return value
        self._ask(value)
        lag = self.stages - self.stage
        if len(self._asked) <= lag:
            return False
        answer = self._answer()
        if not answer or self._calls + self.stage > self._count:
            return False
        for _ in range(self.stage):  # what stages before this one have asked in the meantime
            self._ask(False)
        return True

    def settle(self) -> None:
        """Wait for the questions under way, so that the next ones begin even. Collective."""
        while self._asked:
            self._answer()

    def _ask(self, value: bool) -> None:
        tensor = torch.tensor([int(value)], dtype=torch.int64, device="cpu")
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        if work is not None:
            self._asked.append((work, tensor))

    def _answer(self) -> bool:
        work, tensor = self._asked.popleft()
        work.wait()
        return bool(tensor[0])
