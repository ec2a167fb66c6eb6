"""Each rank's own seconds per step, so that the rank that others wait for can be told.

In a job of collectives all ranks take the same time; what differs is how much of it they wait. On
the CPU the own seconds of a step are wall time minus waits for collectives, data included. On a GPU
the host does not wait, so one step of each logging interval is traced, and its own seconds are the
time of its kernels that are not NCCL's.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from ring_train.platform.waiting import count_waiting, waited_s

logger = logging.getLogger(__name__)

COMMUNICATION = "nccl"
"""In the name of a kernel that waits for other ranks."""


class StepTimes:
    """Own seconds of this rank since the last `gather`: `begin` and `end` around every step.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds: list[float] = []
        self._begun: tuple[float, float] | None = None
        self._traces = device.type == "cuda"
        self._trace: profile | None = None
        count_waiting()

    def begin(self) -> None:
        """Begin a step; data and all that is part of it comes after."""
        if self._traces and not self._seconds and not _is_traced():
            self._trace = profile(activities=[ProfilerActivity.CUDA])
            self._try(self._trace.start)
        self._begun = time.perf_counter(), waited_s()

    def end(self) -> None:
        """End a step, before anything is logged, validated or saved."""
        if self._begun is None:
            return
        (begun, waited), self._begun = self._begun, None
        if self.device.type != "cuda":
            self._seconds.append(time.perf_counter() - begun - (waited_s() - waited))
        elif self._trace is not None:
            self._try(self._end_trace)
            self._trace = None

    def _end_trace(self) -> None:
        assert self._trace is not None
        torch.cuda.synchronize(self.device)
        self._trace.stop()
        self._seconds.append(own_seconds(kernels(self._trace, ProfilerActivity.CUDA)))

    def _try(self, trace: Callable[[], None]) -> None:
        """Do something with a trace; where the driver lets nobody trace, never again."""
        try:
            trace()
        except RuntimeError as error:
            self._traces, self._trace = False, None
            logger.warning("ranks are not timed from now on: steps cannot be traced (%s)", error)

    def gather(self, group: dist.ProcessGroup) -> list[float]:
        """Return the mean own seconds per step of every rank and begin anew. Collective.

        A rank without a measured step counts NaN.

        Args:
            group: of all ranks, for tensors on the CPU.
        """
        mean = statistics.fmean(self._seconds) if self._seconds else math.nan
        self._seconds = []
        own = torch.tensor([mean], dtype=torch.float64, device="cpu")
        everyone = own.new_empty(group.size())
        dist.all_gather_into_tensor(everyone, own, group=group)
        return everyone.tolist()


def _is_traced() -> bool:
    """Return whether another profiler runs, beside which none can be begun."""
    return torch.autograd._profiler_enabled()


def kernels(trace: profile, activity: ProfilerActivity) -> list[tuple[str, float]]:
    """Return (name, seconds) of what ran on the device of an activity."""
    results: Any = trace.profiler
    wanted = torch.autograd.DeviceType.__members__[activity.name]
    return [
        (event.name(), event.duration_ns() / 1e9)
        for event in results.kineto_results.events()
        if event.device_type() == wanted
    ]


def own_seconds(ran: Iterable[tuple[str, float]]) -> float:
    """Return the seconds of all kernels but those that wait for other ranks."""
    return sum(seconds for name, seconds in ran if COMMUNICATION not in name.lower())
