"""start_runtime in one process, without torchrun."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

pytestmark = pytest.mark.usefixtures("warm_megatron")


def make_plan(world_size: int) -> Any:
    """Return the part of a Plan that start_runtime reads."""
    mesh = {"world_size": world_size, "tp": 1, "pp": 1, "vpp": 1, "ep": 1, "etp": 1, "cp": 1}
    return SimpleNamespace(mesh=SimpleNamespace(**mesh), config=SimpleNamespace(seed=1))


def test_one_process_starts_and_stops_by_itself_again_and_again() -> None:
    from ring_train.runtime.distributed import start_runtime

    for _ in range(2):
        with start_runtime(make_plan(1)) as groups:
            assert dist.is_initialized()
            assert (groups.rank, groups.world_size, groups.dp_rank) == (0, 1, 0)
            assert groups.is_first_stage
            assert groups.is_last_stage
            assert groups.collection.dp_cp.size() == 1
        assert not dist.is_initialized()


def test_no_group_stays_behind_to_hang_a_fork() -> None:
    from megatron.core import parallel_state

    from ring_train.runtime.distributed import start_runtime

    with start_runtime(make_plan(1)):
        pass
    left = [name for name, v in vars(parallel_state).items() if isinstance(v, dist.ProcessGroup)]
    assert left == []


def test_everything_stops_when_the_body_raises() -> None:
    from megatron.core import parallel_state

    from ring_train.errors import UserError
    from ring_train.runtime.distributed import start_runtime

    with pytest.raises(UserError, match="bad shard") as caught, start_runtime(make_plan(1)):
        raise UserError("bad shard")
    assert caught.value.rank == 0
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()


def test_another_number_of_processes_than_planned_is_refused() -> None:
    from ring_train.errors import UserError
    from ring_train.runtime.distributed import start_runtime

    with (
        pytest.raises(UserError, match=r"1 process.*made for 8.*--nproc-per-node 8"),
        start_runtime(make_plan(8)),
    ):
        pass
    assert not dist.is_initialized()
