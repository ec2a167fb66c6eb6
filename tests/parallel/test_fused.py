"""The backend of the fused ops in every attention layer is the run's."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import gradients_by_name


def backends(fused: str) -> dict[str, list[str]]:
    """Return the backends that a step of the tiny model asks of each op, in order."""
    from ring_train.model import attention, norm

    asked: dict[str, list[str]] = {}

    def recorded(module: Any, name: str) -> Any:
        original = getattr(module, name)

        def call(*args: Any, backend: str, **kwargs: Any) -> Any:
            asked.setdefault(name, []).append(backend)
            return original(*args, backend="torch", **kwargs)

        return mock.patch.object(module, name, call)

    with recorded(attention, "split_qk_norm_rope"), recorded(norm, "gated_group_norm"):
        gradients_by_name([f"kernels.fused={fused}", "train.global_batch_size=2"])
    return asked


@pytest.mark.parametrize("fused", ["auto", "torch"])
def test_attention_asks_for_the_backend_of_the_run(fused: str, on_ranks: OnRanks) -> None:
    asked = on_ranks(1, backends, fused)[0]
    assert set(asked["split_qk_norm_rope"]) == {fused}
    assert set(asked["gated_group_norm"]) == {fused}
    # Softmax layers and the MTP depth split heads, too, but have no gate.
    assert len(asked["split_qk_norm_rope"]) > len(asked["gated_group_norm"])
