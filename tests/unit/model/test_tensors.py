"""A shard is cut out of the full tensor and gathered back, in the order of the ranks."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ring_train.platform  # noqa: F401  (before the first import of megatron-core)
from ring_train.model.tensors import LocalTensor, Shard


def gather(parts: list[torch.Tensor], shard: Shard, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what rank `shard.rank` gathers when every rank holds its part."""

    def all_gather(out: list[torch.Tensor], local: torch.Tensor, group: object) -> None:
        assert local.is_contiguous()
        assert local.equal(parts[shard.rank])
        for buffer, part in zip(out, parts, strict=True):
            buffer.copy_(part)

    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    return shard.gather(parts[shard.rank])


@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    dim=st.integers(0, 2),
    world=st.integers(1, 4),
    blocks=st.integers(1, 2),
)
def test_gathering_undoes_cutting(shape: list[int], dim: int, world: int, blocks: int) -> None:
    dim %= len(shape)
    shape[dim] *= world * blocks
    full = torch.arange(torch.Size(shape).numel()).view(shape)
    shards = [Shard(dim, world, rank, blocks) for rank in range(world)]
    parts = [shard.of(full) for shard in shards]
    assert sum(part.numel() for part in parts) == full.numel()
    for shard, part in zip(shards, parts, strict=True):
        assert shard.full_shape(part.shape) == tuple(shape)
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert gather(parts, shard, monkeypatch).equal(full)


def test_stacked_blocks_are_cut_one_by_one() -> None:
    gate, up = torch.arange(4), torch.arange(10, 14)
    shards = [Shard(dim=0, world=2, rank=rank, blocks=2) for rank in range(2)]
    parts = [shard.of(torch.cat([gate, up])).tolist() for shard in shards]
    assert parts == [[0, 1, 10, 11], [2, 3, 12, 13]]


def test_a_part_that_is_no_block_of_memory_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    full = torch.arange(12).view(3, 4)
    shard = Shard(dim=1, world=2, rank=1)
    parts = [full[:, :2], full[:, 2:]]
    assert not parts[1].is_contiguous()
    assert gather(parts, shard, monkeypatch).equal(full)


def test_a_whole_tensor_needs_no_communication() -> None:
    tensor = torch.arange(3)
    shard = Shard(dim=0, world=1, rank=0)
    assert shard.gather(tensor) is tensor
    assert shard.of(tensor).equal(tensor)
    assert LocalTensor("x", tensor, shard, is_copy=False, owner=tensor).full_shape == (3,)
