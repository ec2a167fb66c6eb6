"""Fixtures of several rank tests."""

import pytest

from ring_train.config import Precision


@pytest.fixture
def fp64(warm_megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model computes in fp64 where the config says fp32, in this process and its forks."""
    import torch

    from ring_train.plan import megatron

    monkeypatch.setitem(megatron.DTYPES, Precision.fp32, torch.float64)
