"""The rank that others wait for is told apart from those that wait."""

import math
import time
from typing import Any

from tests.conftest import OnRanks

SLEEP_S = 0.4
OVERHEAD_S = 0.15
"""Of a collective, and of a machine that is shared."""


def slow_rank_1() -> tuple[list[float], list[float]]:
    """Two steps in which rank 1 sleeps and rank 0 waits; then a gather without a step."""
    import torch
    import torch.distributed as dist

    from ring_train.train.stragglers import StepTimes

    group = dist.group.WORLD
    assert group is not None
    times = StepTimes(torch.device("cpu"))
    for _ in range(2):
        times.begin()
        if dist.get_rank() == 1:
            time.sleep(SLEEP_S)
        dist.all_reduce(torch.ones(4))
        handle: Any = dist.all_reduce(torch.ones(4), async_op=True)
        handle.wait()
        times.end()
    return times.gather(group), times.gather(group)


def test_only_the_slow_rank_is_slow(on_ranks: OnRanks) -> None:
    for measured, empty in on_ranks(2, slow_rank_1):
        fast, slow = measured
        assert SLEEP_S <= slow < SLEEP_S + OVERHEAD_S
        assert 0 <= fast < OVERHEAD_S
        assert all(math.isnan(value) for value in empty)


def traced_seconds() -> tuple[float, float]:
    """Seconds of a matrix product and of all but it, as on a GPU but of the CPU's operators."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from ring_train.train.stragglers import kernels, own_seconds

    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:
        torch.ones(300, 300) @ torch.ones(300, 300)
    ran = kernels(trace, ProfilerActivity.CPU)
    assert {"aten::matmul", "aten::mm"} <= {name for name, _ in ran}
    renamed = [(name.replace("aten::mm", "ncclDevKernel_AllReduce"), s) for name, s in ran]
    return own_seconds(ran), own_seconds(renamed)


def test_kernels_that_wait_for_other_ranks_do_not_count(on_ranks: OnRanks) -> None:
    ((everything, own),) = on_ranks(1, traced_seconds)
    assert 0 < own < everything
