"""The fixture itself: results by rank, and every way in which a rank can fail is told."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.conftest import OnRanks


def sum_of_ranks(offset: int) -> tuple[int, int]:
    total = torch.tensor(dist.get_rank() + offset)
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def test_results_come_back_by_rank(on_ranks: OnRanks) -> None:
    assert on_ranks(3, sum_of_ranks, 10) == [(0, 33), (1, 33), (2, 33)]


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 does not like it")
    dist.barrier()


def test_an_exception_of_one_rank_is_raised_with_its_traceback(on_ranks: OnRanks) -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2.*in fail_on_rank_1.*not like it"):
        on_ranks(2, fail_on_rank_1)
    assert time.monotonic() - started < 10


def die_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(9)
    dist.barrier()


def test_a_killed_rank_is_reported(on_ranks: OnRanks) -> None:
    with pytest.raises(AssertionError, match="rank 1 of 2: died without a word"):
        on_ranks(2, die_on_rank_1)


def hang_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_a_hanging_rank_is_killed_at_the_timeout(on_ranks: OnRanks) -> None:
    message = r"(?s)\[0\] of 2 not finished after 2 s.*in hang_on_rank_0"
    with pytest.raises(AssertionError, match=message):
        on_ranks(2, hang_on_rank_0, timeout_s=2.0)


def test_a_result_that_cannot_be_pickled_is_an_error(on_ranks: OnRanks) -> None:
    with pytest.raises(AssertionError, match="rank 0 of 1"):
        on_ranks(1, lambda: lambda: None)
