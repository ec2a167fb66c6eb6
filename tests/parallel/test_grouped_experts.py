"""Grouped experts: the numbers, names and checkpoints of experts that are computed one by one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import (
    EP2,
    TP2,
    gradients_by_name,
    relative_errors,
    short_plan,
)
from tests.parallel.test_gradients import GRADIENT_TOLERANCE, LOSS_TOLERANCE

GROUPED = ["kernels.experts=grouped"]
SEQUENTIAL = ["kernels.experts=sequential"]
ETP2 = ["parallel.expert_tensor_parallel_size=2"]
BASE = ["model.mtp_num_layers=2", "train.micro_batch_size=1", "model.moe_z_loss_coeff=3.0"]
LAYOUTS = {
    "one_rank": (1, [], 1),
    "one_rank_padded": (1, [], 40),
    "ep2": (2, EP2, 1),
    "etp2": (2, ETP2, 1),
    "tp2": (2, TP2, 1),
    "tp2_ep2": (2, [*TP2, *EP2], 1),
    "tp2_ep2_etp2": (4, [*TP2, *EP2, *ETP2], 1),
}
"""(ranks, overrides, tokens that rows are padded to a multiple of)."""
PRECISION_TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}
"""Relative to a gradient: rounding, 6e-8 or 4e-3 each time, enlarged by the group norm."""


def gradients(overrides: list[str], pad_to_multiple: int) -> dict[str, Any]:
    return gradients_by_name([*BASE, *overrides], pad_to_multiple=pad_to_multiple)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_gradients_and_counts_are_those_of_experts_one_by_one(
    layout: str, found: dict[str, Any], fp64: None, on_ranks: OnRanks
) -> None:
    if not found:
        found.update(on_ranks(1, gradients, SEQUENTIAL, 1)[0])
    ranks, overrides, multiple = LAYOUTS[layout]
    seen: set[str] = set()
    for result in on_ranks(ranks, gradients, [*GROUPED, *overrides], multiple):
        assert result["losses"] == pytest.approx(found["losses"], abs=LOSS_TOLERANCE, rel=0)
        errors = relative_errors(result["gradients"], found["gradients"])
        assert not {n: error for n, error in errors.items() if error > GRADIENT_TOLERANCE}
        seen |= result["gradients"].keys()
        for number, load in result["loads"].items():
            assert load[0] == found["loads"][number][0]
    assert seen == found["gradients"].keys()


def empty_gradients(overrides: list[str]) -> dict[str, Any]:
    """Return the gradients where a rank sends no token to the first experts, and their counts."""
    import torch

    from ring_train.model.router import ExpertRouter

    routing = ExpertRouter.routing

    def biased(self: Any, logits: torch.Tensor) -> Any:
        self.expert_bias[:] = torch.tensor([-9.0] * 3 + [0.0] * (len(self.expert_bias) - 3))
        return routing(self, logits)

    ExpertRouter.routing = biased
    return gradients(overrides, 1)


@pytest.mark.parametrize("layout", ["one_rank", "ep2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_experts_without_a_token_have_a_gradient_of_zeros(
    precision: str, layout: str, on_ranks: OnRanks
) -> None:
    ranks, overrides = LAYOUTS[layout][:2]
    words = [*overrides, f"train.precision={precision}"]
    expected = on_ranks(ranks, empty_gradients, [*SEQUENTIAL, *words])
    found = on_ranks(ranks, empty_gradients, [*GROUPED, *words])
    tolerance = PRECISION_TOLERANCE[precision]
    seen = False
    for ours, theirs in zip(found, expected, strict=True):
        assert all(load[0][:3] == [0, 0, 0] for load in ours["loads"].values())
        for name, gradient in theirs["gradients"].items():
            if gradient.any():
                error = (ours["gradients"][name] - gradient).norm() / gradient.norm()
                assert float(error) <= tolerance, name
            else:
                assert not ours["gradients"][name].any(), name
                seen |= ".experts.0." in name
    assert seen


def losses_in_eval_and_training(overrides: list[str]) -> bool:
    """Return whether the losses of a row are the same in both modes, and with and without grad."""
    import torch

    from ring_train.model.build import build_model
    from ring_train.model.experts import GroupedExperts
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.scoring import token_losses
    from tests.parallel.streams import make_micro_batches

    with start_runtime(short_plan(overrides)) as groups:
        plan = short_plan(overrides)
        model = build_model(plan, groups.collection)
        kinds = [type(module) for chunk in model for module in chunk.modules()]
        assert GroupedExperts in kinds
        rows = make_micro_batches(plan, 0, groups.dp_rank)[:1]
        trained = token_losses(model, rows, groups.collection)[0]
        for chunk in model:
            chunk.eval()
        with torch.no_grad():
            scored = token_losses(model, rows, groups.collection)[0]
        return bool((trained == scored).all())


@pytest.mark.parametrize("layout", ["one_rank", "ep2"])
def test_generation_computes_what_training_does(layout: str, on_ranks: OnRanks) -> None:
    ranks, overrides = LAYOUTS[layout][:2]
    assert all(on_ranks(ranks, losses_in_eval_and_training, [*GROUPED, *overrides]))


OVERLAPPED = ["kernels.moe_shared_expert_overlap=true"]


@pytest.mark.parametrize("experts", ["grouped", "sequential"])
@pytest.mark.parametrize("layout", ["one_rank", "tp2_ep2"])
def test_overlapped_shared_experts_change_no_gradient(
    layout: str, experts: str, found: dict[str, Any], fp64: None, on_ranks: OnRanks
) -> None:
    if not found:
        found.update(on_ranks(1, gradients, SEQUENTIAL, 1)[0])
    ranks, overrides, multiple = LAYOUTS[layout]
    words = [f"kernels.experts={experts}", *OVERLAPPED, *overrides]
    for result in on_ranks(ranks, gradients, words, multiple):
        errors = relative_errors(result["gradients"], found["gradients"])
        assert not {n: error for n, error in errors.items() if error > GRADIENT_TOLERANCE}


def num_products(overrides: list[str]) -> int:
    """Return how often grouped experts were computed in a step."""
    from ring_train.model.experts import GroupedExperts

    calls = []
    kind: Any = GroupedExperts
    forward = kind.forward

    def counted(self: Any, *args: Any) -> Any:
        calls.append(self)
        return forward(self, *args)

    kind.forward = counted
    gradients_by_name([*BASE, *GROUPED, *overrides])
    return len(calls)


def test_recomputation_computes_experts_twice(on_ranks: OnRanks) -> None:
    recompute = [
        "parallel.recompute_granularity=selective",
        "parallel.recompute_modules=[moe]",
    ]
    (once,) = on_ranks(1, num_products, [])
    assert once > 1
    assert on_ranks(1, num_products, recompute) == [2 * once]
