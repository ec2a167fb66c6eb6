"""Tests that need the environment of `make test-te`; elsewhere there are none."""

import importlib.util

import pytest

from ring_train.config import Precision

if importlib.util.find_spec("transformer_engine") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def fp64(warm_megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model computes in fp64 where the config says bf16, in this process and its forks."""
    import torch

    from ring_train.plan import megatron

    monkeypatch.setitem(megatron.DTYPES, Precision.bf16, torch.float64)
