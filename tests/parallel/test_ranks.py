"""How long ranks without a mesh wait for one another."""

import os

import torch
import torch.distributed as dist

from tests.conftest import OnRanks

HOUR_S = 3600


def group_timeout_s(port: int) -> float:
    """Leave the fixture's world, be a rank of torchrun's and return the timeout of its group."""
    from ring_train.runtime.ranks import start_ranks

    dist.destroy_process_group()
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    with start_ranks() as ranks:
        assert ranks.world_size == 2
        backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
        return backend.options._timeout.total_seconds()


def test_ranks_wait_for_one_that_copies_a_large_file(on_ranks: OnRanks) -> None:
    """Gloo gives up after half an hour."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert on_ranks(2, group_timeout_s, agent.port) == [12 * HOUR_S] * 2
