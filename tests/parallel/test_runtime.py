"""start_runtime on several ranks: places in the mesh, worlds of torchrun, errors told once."""

import contextlib
import io
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import OnRanks


def make_plan(world_size: int, **degrees: int) -> Any:
    """Return the part of a Plan that start_runtime reads."""
    mesh = {"world_size": world_size, "tp": 1, "pp": 1, "vpp": 1, "ep": 1, "etp": 1, "cp": 1}
    return SimpleNamespace(mesh=SimpleNamespace(**(mesh | degrees)), config=SimpleNamespace(seed=1))


def places(degrees: dict[str, int]) -> tuple[int, ...]:
    from ring_train.runtime.distributed import start_runtime

    with start_runtime(make_plan(4, **degrees)) as groups:
        total = torch.ones(1)
        dist.all_reduce(total, group=groups.collection.dp_cp)
        assert int(total) == groups.collection.dp_cp.size()
        return (groups.tp_rank, groups.cp_rank, groups.ep_rank, groups.dp_rank, groups.pp_rank)


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        ({"tp": 2, "pp": 2}, [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 0, 1), (1, 0, 0, 0, 1)]),
        ({"ep": 2}, [(0, 0, 0, 0, 0), (0, 0, 1, 1, 0), (0, 0, 0, 2, 0), (0, 0, 1, 3, 0)]),
        ({"cp": 2}, [(0, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 0, 1, 0), (0, 1, 0, 1, 0)]),
    ],
)
def test_ranks_have_their_place_in_the_mesh(
    degrees: dict[str, int], expected: list[tuple[int, ...]], on_ranks: OnRanks
) -> None:
    assert on_ranks(4, places, degrees) == expected


def two_layouts_one_after_the_other() -> list[int]:
    from ring_train.runtime.distributed import start_runtime

    ranks = []
    for degrees in ({"tp": 2}, {"pp": 2}, {}):
        with start_runtime(make_plan(2, **degrees)) as groups:
            ranks += [groups.tp_rank, groups.pp_rank, groups.dp_rank]
    return ranks


def test_one_world_serves_several_layouts(on_ranks: OnRanks) -> None:
    first, second = on_ranks(2, two_layouts_one_after_the_other)
    assert first == [0] * 9
    assert second == [1, 0, 0, 0, 1, 0, 0, 0, 1]


def enter_while_one_rank_is_late(marker: Path) -> bool:
    """Return whether rank 0, which is the last to make its groups, had made them."""
    from ring_train.runtime import distributed

    make_group = distributed._control_group

    def make_late() -> dist.ProcessGroup:
        group = make_group()
        if dist.get_rank() == 0:
            time.sleep(0.5)
            marker.touch()
        return group

    distributed._control_group = make_late
    with distributed.start_runtime(make_plan(2)):
        return marker.exists()


def test_no_rank_may_leave_while_another_connects(on_ranks: OnRanks, tmp_path: Path) -> None:
    """Gloo fails on the slower one: connection closed by peer."""
    assert on_ranks(2, enter_while_one_rank_is_late, tmp_path / "made") == [True, True]


def job_that_fails(port: int, only_rank: int | None) -> tuple[int, str]:
    """Leave the fixture's world and be a rank of torchrun's, whose agent hosts the store."""
    from ring_train.errors import UserError
    from ring_train.runtime.distributed import start_runtime
    from ring_train.runtime.errors import run_job

    rank = dist.get_rank()
    dist.destroy_process_group()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }

    def main() -> None:
        with start_runtime(make_plan(2)):
            if only_rank in (None, rank):
                raise UserError("tensor x is missing")

    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), pytest.raises(SystemExit) as stop:
        run_job(main)
    return int(stop.value.code or 0), stderr.getvalue()


@pytest.mark.parametrize("only_rank", [None, 1])
def test_an_error_inside_a_job_is_told_once(only_rank: int | None, on_ranks: OnRanks) -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    results = on_ranks(2, job_that_fails, agent.port, only_rank)
    assert sorted(text for _, text in results) == ["", "error: tensor x is missing\n"]
    assert [status for status, _ in results] == ([2, 2] if only_rank is None else [0, 2])
