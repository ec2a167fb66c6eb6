"""Recomputed activations change nothing: losses, gradients, expert counts and biases, bit for bit.

Each test also counts how often the modules ran, so that equality is not that of doing nothing.
"""

from collections import Counter
from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import (
    EP2,
    PP2,
    TP2,
    gradients_by_name,
    relative_errors,
)
from tests.parallel.test_gradients import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from tests.parallel.test_training_layouts import FIGURES, train

BASE = ["model.mtp_num_layers=2", "train.micro_batch_size=1"]
VPP2 = ["parallel.virtual_pipeline_model_parallel_size=2"]
FULL = ["parallel.recompute_granularity=full", "parallel.recompute_method=uniform"]
FULL += ["parallel.recompute_num_layers=1"]
COUNTED = {
    "layer": "TransformerLayer",
    "core_attn": "DocumentAttention",
    "mlp": "MLP",
    "moe": "ExpertRouter",
    "experts": "GroupedExperts",
    "shared_experts": "SharedExpertMLP",
}
"""Class whose forward a kind of recomputation repeats; megatron repeats a MoE layer from inside."""


def selective(*modules: str) -> list[str]:
    names = ",".join(modules)
    return ["parallel.recompute_granularity=selective", f"parallel.recompute_modules=[{names}]"]


KINDS = {
    "uniform_1": (FULL, {"layer": 6}),
    "uniform_3": ([*FULL, "parallel.recompute_num_layers=3"], {"layer": 6}),
    "block_1": (
        *([*FULL, "parallel.recompute_method=block", "parallel.recompute_num_layers=1"],),
        {"layer": 3},
    ),
    "core_attn": (selective("core_attn"), {"core_attn": 4}),
    "mlp": (selective("mlp"), {"mlp": 1}),
    "moe": (selective("moe"), {"moe": 5, "shared_experts": 5}),
    "shared_experts": (selective("shared_experts"), {"shared_experts": 5}),
    "all_parts": (
        *(selective("core_attn", "mlp", "moe", "shared_experts"),),
        {"core_attn": 4, "mlp": 1, "moe": 5, "experts": 5, "shared_experts": 10},
    ),
    "mlp_and_moe": (selective("mlp", "moe"), {"mlp": 1, "moe": 5, "shared_experts": 5}),
    "moe_and_shared_experts": (
        *(selective("moe", "shared_experts"),),
        {"moe": 5, "shared_experts": 10},
    ),
}
"""Overrides, and how many more forwards of a module one micro batch runs."""


def counted_gradients(overrides: list[str]) -> dict[str, Any]:
    """Return the gradients of a step, and how often the forward of each class ran."""
    import torch

    calls: Counter[str] = Counter()

    def count(module: torch.nn.Module, *_: Any) -> None:
        calls[type(module).__name__] += 1

    with torch.nn.modules.module.register_module_forward_hook(count):
        result = gradients_by_name(overrides)
    return result | {"calls": dict(calls)}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_is_bit_equal(kind: str, found: dict[str, Any], on_ranks: OnRanks) -> None:
    if not found:
        found.update(on_ranks(1, counted_gradients, BASE)[0])
    overrides, more = KINDS[kind]
    result = on_ranks(1, counted_gradients, [*BASE, *overrides])[0]
    micro_batches = 4
    for part, extra in more.items():
        name = COUNTED[part]
        assert result["calls"][name] == found["calls"][name] + extra * micro_batches, part
    assert_same(result, found)


def test_experts_one_by_one_are_bit_equal(on_ranks: OnRanks) -> None:
    base = [*BASE, "kernels.experts=sequential"]
    plain = on_ranks(1, counted_gradients, base)[0]
    result = on_ranks(1, counted_gradients, [*base, *selective("moe")])[0]
    layers, experts, micro_batches = 5, 8, 4
    assert result["calls"]["MLP"] == plain["calls"]["MLP"] + layers * experts * micro_batches
    assert_same(result, plain)


def assert_same(result: dict[str, Any], reference: dict[str, Any]) -> None:
    """Losses, expert counts, z-losses and every gradient are equal bit for bit."""
    assert result["losses"] == reference["losses"]
    assert result["loads"] == reference["loads"]
    gradients = reference["gradients"]
    assert result["gradients"].keys() == gradients.keys()
    assert not [
        name for name, grad in result["gradients"].items() if not grad.equal(gradients[name])
    ]


LAYOUTS = {
    "tp2_pp2_ep2": (4, [*TP2, *PP2, *EP2]),
    "tp2_pp2_vpp2_ep2": (4, [*TP2, *PP2, *VPP2, *EP2]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_full_recomputation_is_bit_equal_under_a_layout(layout: str, on_ranks: OnRanks) -> None:
    ranks, overrides = LAYOUTS[layout]
    plain = on_ranks(ranks, counted_gradients, [*BASE, *overrides])
    for result, reference in zip(
        on_ranks(ranks, counted_gradients, [*BASE, *overrides, *FULL]), plain, strict=True
    ):
        more = result["calls"]["TransformerLayer"] - reference["calls"]["TransformerLayer"]
        assert more == reference["calls"]["TransformerLayer"]
        assert_same(result, reference)


def test_selective_recomputation_under_a_layout_matches_one_rank(
    fp64: None, on_ranks: OnRanks
) -> None:
    reference = on_ranks(1, gradients_by_name, BASE)[0]
    overrides = [*TP2, *PP2, *VPP2, *EP2, *selective("core_attn", "mlp", "moe")]
    for result in on_ranks(4, gradients_by_name, [*BASE, *overrides]):
        assert result["losses"] == pytest.approx(reference["losses"], abs=LOSS_TOLERANCE, rel=0)
        errors = relative_errors(result["gradients"], reference["gradients"])
        assert not {n: error for n, error in errors.items() if error > GRADIENT_TOLERANCE}


def test_training_and_biases_are_bit_equal(on_ranks: OnRanks) -> None:
    plain, full, parts = on_ranks(1, run_three, 6)[0]
    assert min(plain["bias"]) > 0
    for key in (*FIGURES, "bias"):
        assert full[key] == parts[key] == plain[key], key


def run_three(num_steps: int) -> list[dict[str, list[float]]]:
    """Return a short run without recomputation, with full, and with selective."""
    return [train(words, num_steps) for words in ([], FULL, selective("mlp", "moe"))]
