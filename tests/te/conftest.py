"""Needs the environment of `make test-te`; torch comes first, whose libraries the others find."""

import pytest

from ring_train.config import Precision

pytest.importorskip("torch")
pytest.importorskip(
    "transformer_engine.pytorch", reason="Transformer Engine is not installed; use make test-te"
)


@pytest.fixture
def fp64(warm_megatron: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model computes in fp64 where the config says bf16, in this process and its forks."""
    import torch

    from ring_train.plan import megatron

    monkeypatch.setitem(megatron.DTYPES, Precision.bf16, torch.float64)
