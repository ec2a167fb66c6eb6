"""Both losses of a softmax router belong to the global batch, and their gradients to the formula.

In fp64, for the reasons of test_gradients. The reference is autograd of the plain formula over the
whole batch in one row, with the loads of another batch counted before.
"""

from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import (
    EP2,
    FIRST_GENERATION,
    PP2,
    TP2,
    gradients_by_name,
    relative_errors,
    short_plan,
)

GRADIENT_TOLERANCE = 1e-6
"""Relative, L2: gradients are accumulated in fp32, see test_gradients."""
FIRST, SECOND = 0, 1
"""Steps: the first is counted, the second is differentiated."""
CP2 = ["parallel.context_parallel_size=2"]
FULL = ["parallel.recompute_granularity=full", "parallel.recompute_method=uniform"]
LAYOUTS = {
    "four_micro_batches": (1, ["train.micro_batch_size=1"], 1),
    "recomputed": (1, [*FULL, "parallel.recompute_num_layers=1"], 1),
    "dp2_padded": (2, [], 40),
    "tp2_sp_padded": (2, TP2, 40),
    "pp2": (2, PP2, 1),
    "ep2": (2, EP2, 1),
    "cp2_padded": (2, CP2, 40),
}
"""(ranks, overrides, tokens that rows are padded to a multiple of)."""


def gradients(overrides: list[str], pad_to_multiple: int) -> dict[str, Any]:
    words = [*FIRST_GENERATION, *overrides]
    return gradients_by_name(words, step=SECOND, pad_to_multiple=pad_to_multiple, after_step=FIRST)


def plain_reference() -> dict[str, Any]:
    """Return gradients with and without the balance loss, and both losses by router.

    B = sum_i L_i P_i: L_i is the count of expert i in the step before over the mean of all counts,
    P_i the mean softmax of expert i. z = mean(logsumexp^2).
    """
    import torch

    from ring_train.model.build import build_model
    from ring_train.model.tensors import local_tensors
    from ring_train.runtime.distributed import start_runtime
    from tests.parallel.streams import make_micro_batches

    losses = ["model.moe_z_loss_coeff=0", "model.moe_aux_loss_coeff=0"]
    # One by one, so that each weight of an expert is a parameter to differentiate by.
    words = [*losses, "train.micro_batch_size=4", "kernels.experts=sequential"]
    plan = short_plan([*FIRST_GENERATION, *words])
    model = short_plan(FIRST_GENERATION).config.model
    with start_runtime(plan) as groups:
        chunk: Any = build_model(plan, groups.collection)[0].module
        seen = watched_logits(chunk)

        def run(step: int) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
            seen.clear()
            (batch,) = make_micro_batches(plan, step, 0)
            (lm,) = chunk(batch)
            chosen = [logits.topk(model.moe_router_topk, dim=-1).indices for logits in seen]
            counts = [torch.bincount(x.flatten(), minlength=8).double() for x in chosen]
            return lm[batch.loss_mask].mean(), [*seen], [c / c.mean() for c in counts]

        _, _, before = run(FIRST)
        loss, all_logits, loads = run(SECOND)
        means = [logits.softmax(-1).mean(0) for logits in all_logits]
        balance = [(load * p).sum() for load, p in zip(before, means, strict=True)]
        z_losses = [logits.logsumexp(-1).square().mean() for logits in all_logits]
        parameters = {item.name: item.tensor for item in local_tensors([chunk])}

        def differentiate(value: torch.Tensor) -> list[torch.Tensor]:
            inputs = list(parameters.values())
            options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
            return list(torch.autograd.grad(value, inputs, **options))

        of_z = differentiate(model.moe_z_loss_coeff * torch.stack(z_losses).sum())
        of_balance = differentiate(model.moe_aux_loss_coeff * torch.stack(balance).sum())
        # Last, because megatron's cross-entropy may be differentiated once.
        without = [a + b for a, b in zip(of_z, differentiate(loss), strict=True)]
        sums = [a + b for a, b in zip(of_balance, without, strict=True)]
        return {
            "gradients": dict(zip(parameters, sums, strict=True)),
            "without_balance": dict(zip(parameters, without, strict=True)),
            "z_loss": [float(value) for value in z_losses],
            "balance_loss": [float((load * p).sum()) for load, p in zip(loads, means, strict=True)],
        }


def watched_logits(chunk: Any) -> list[Any]:
    """Return a list to which every router appends its logits [t, e] of each forward."""
    from ring_train.model.router import routers

    seen = []
    for router in routers([chunk]):

        def gate(input: Any, gating: Any = router.gating) -> Any:
            logits = gating(input)
            seen.append(logits.flatten(0, -2))
            return logits

        router.gating = gate
    return seen


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {}


def reference_step(on_ranks: OnRanks, found: dict[str, Any]) -> dict[str, Any]:
    """Return the plain reference, made once and checked to be worth comparing with."""
    if not found:
        found.update(on_ranks(1, plain_reference)[0])
        routers = {n: g for n, g in found["gradients"].items() if n.endswith("router.weight")}
        assert len(routers) == 4
        assert min(relative_errors(routers, found["without_balance"]).values()) > 0.1
        assert all(1.0 < value < 8 / 3 for value in found["balance_loss"])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_of_the_formula(
    layout: str, found: dict[str, Any], fp64: None, on_ranks: OnRanks
) -> None:
    reference = reference_step(on_ranks, found)
    ranks, overrides, multiple = LAYOUTS[layout]
    loads: dict[int, Any] = {}
    for result in on_ranks(ranks, gradients, overrides, multiple):
        loads |= result["loads"]
        errors = relative_errors(result["gradients"], reference["gradients"])
        wrong = {name: error for name, error in errors.items() if error > GRADIENT_TOLERANCE}
        assert not wrong
    assert sorted(loads) == [1, 2, 3, 4]
    for key, place in (("z_loss", 1), ("balance_loss", 2)):
        values = [loads[number][place] for number in sorted(loads)]
        assert values == pytest.approx(reference[key], rel=1e-6)
