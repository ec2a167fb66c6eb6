"""The direct path of experts gives bit for bit what megatron's dispatcher and modules give."""

from __future__ import annotations

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import EP2, TP2, short_plan

ADAPTED = ["lora=all", "init_from=unused", "model.moe_router_bias_update_rate=0"]
LAYOUTS = {"one_rank": (1, []), "tp2_sp": (2, TP2), "ep2": (2, EP2)}


def compare_paths(overrides: list[str]) -> bool:
    """Return whether the losses of a row are the same by both paths."""
    import torch

    from ring_train.model.build import build_model
    from ring_train.model.experts import Experts
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.scoring import token_losses
    from tests.parallel.streams import make_micro_batches

    plan = short_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        rows = make_micro_batches(plan, 0, groups.dp_rank)[:1]
        own = [module for chunk in model for module in chunk.modules() if type(module) is Experts]
        with torch.no_grad():
            assert all(module.eval().is_direct() for module in own)
        direct = token_losses(model, rows, groups.collection)[0]
        for module in own:
            module.is_plain = False
        other = token_losses(model, rows, groups.collection)[0]
        return bool((direct == other).all())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_direct_path_is_bit_equal(layout: str, precision: str, on_ranks: OnRanks) -> None:
    ranks, overrides = LAYOUTS[layout]
    overrides = [*overrides, f"train.precision={precision}"]
    assert all(on_ranks(ranks, compare_paths, overrides))


def direct_experts(overrides: list[str]) -> list[bool]:
    """Return for each layer's experts whether they would run directly in eval mode."""
    import torch

    from ring_train.model.build import build_model
    from ring_train.model.experts import Experts
    from ring_train.runtime.distributed import start_runtime

    plan = short_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        own = [module for chunk in model for module in chunk.modules() if type(module) is Experts]
        with torch.no_grad():
            assert not any(module.is_direct() for module in own), "in train mode"
            return [module.eval().is_direct() for module in own]


def test_adapted_experts_run_through_their_adapters(on_ranks: OnRanks) -> None:
    (plain,) = on_ranks(1, direct_experts, [])
    assert len(plain) > 1
    assert all(plain)
    (adapted,) = on_ranks(1, direct_experts, ADAPTED)
    assert not any(adapted)
