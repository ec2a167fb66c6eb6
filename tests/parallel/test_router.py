"""What a router counts, adds to the loss and learns belongs to the global batch, however it is cut.

In fp64, for the reasons of test_gradients.
"""

from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import (
    EP2,
    PP2,
    TP2,
    gradients_by_name,
    relative_errors,
    short_plan,
)

GRADIENT_TOLERANCE = 1e-6
"""Relative, L2: gradients are accumulated in fp32, see test_gradients."""
Z_LOSS = ["model.moe_z_loss_coeff=3.0"]
"""So large that it outweighs the cross-entropy in every router."""
WHOLE = ["train.micro_batch_size=4"]
LAYOUTS = {
    "four_micro_batches": (1, ["train.micro_batch_size=1"], 1),
    "padded": (1, [], 40),
    "dp2": (2, [], 1),
    "dp2_padded": (2, [], 40),
    "tp2_sp": (2, TP2, 1),
    "tp2_sp_padded": (2, TP2, 40),
    "pp2": (2, PP2, 1),
    "ep2": (2, EP2, 1),
}
"""(ranks, overrides, tokens that rows are padded to a multiple of)."""


def gradients(overrides: list[str], pad_to_multiple: int) -> dict[str, Any]:
    return gradients_by_name([*Z_LOSS, *overrides], pad_to_multiple=pad_to_multiple)


def plain_reference() -> dict[str, Any]:
    """Return gradients of cross-entropy + coefficient * mean(logsumexp^2) of each router.

    Autograd of the plain sum over the global batch in one row: no scaling of ours, no megatron
    schedule.
    """
    import torch

    from ring_train.model.build import build_model
    from ring_train.model.router import routers
    from ring_train.model.tensors import local_tensors
    from ring_train.runtime.distributed import start_runtime
    from tests.parallel.streams import make_micro_batches

    # One by one, so that each weight of an expert is a parameter to differentiate by.
    plan = short_plan([*WHOLE, "model.moe_z_loss_coeff=0", "kernels.experts=sequential"])
    coefficient = short_plan(Z_LOSS).config.model.moe_z_loss_coeff
    with start_runtime(plan) as groups:
        chunk: Any = build_model(plan, groups.collection)[0].module
        squares: list[torch.Tensor] = []
        counts: list[list[int]] = []
        for router in routers([chunk]):
            gating, routing = router.gating, router.routing

            def gate(input: torch.Tensor, gating: Any = gating) -> torch.Tensor:
                logits = gating(input)
                squares.append(logits.flatten(0, -2).logsumexp(-1).square().mean())
                return logits

            def route(logits: torch.Tensor, routing: Any = routing) -> Any:
                probs, chosen = routing(logits)
                counts.append(chosen.long().sum(0).tolist())
                return probs, chosen

            router.gating, router.routing = gate, route
        (batch,) = make_micro_batches(plan, 0, 0)
        lm, mtp = chunk(batch)
        factor = plan.config.model.mtp_loss_scaling_factor
        loss = lm[batch.loss_mask].mean() + factor * mtp[batch.mtp_loss_mask[0]].mean()
        parameters = {
            item.name: item.tensor
            for item in local_tensors([chunk])
            if isinstance(item.tensor, torch.nn.Parameter)
        }
        z_loss = coefficient * torch.stack(squares).sum()
        inputs = list(parameters.values())
        of_z = torch.autograd.grad(
            z_loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        # Last, because megatron's cross-entropy may be differentiated once.
        without = torch.autograd.grad(loss, inputs)
        sums = [z_grad + grad for z_grad, grad in zip(of_z, without, strict=True)]
        return {
            "gradients": dict(zip(parameters, sums, strict=True)),
            "without_z": dict(zip(parameters, without, strict=True)),
            "counts": counts,
            "z_loss": [float(square) for square in squares],
            "tokens": len(batch.tokens),
            "topk": plan.config.model.moe_router_topk,
        }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {}


def reference_step(on_ranks: OnRanks, found: dict[str, Any]) -> dict[str, Any]:
    """Return the plain reference, made once and checked to be worth comparing with."""
    if not found:
        found.update(on_ranks(1, plain_reference)[0])
        routers = {n: g for n, g in found["gradients"].items() if n.endswith("router.weight")}
        assert len(routers) == len(found["counts"]) == 4
        assert min(relative_errors(routers, found["without_z"]).values()) > 1
        assert len({tuple(counts) for counts in found["counts"]}) == 4
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counts_and_z_loss_match_a_plain_reference(
    layout: str, found: dict[str, Any], fp64: None, on_ranks: OnRanks
) -> None:
    reference = reference_step(on_ranks, found)
    ranks, overrides, multiple = LAYOUTS[layout]
    results = on_ranks(ranks, gradients, overrides, multiple)
    loads: dict[int, Any] = {}
    for result in results:
        loads |= result["loads"]
        errors = relative_errors(result["gradients"], reference["gradients"])
        wrong = {name: error for name, error in errors.items() if error > GRADIENT_TOLERANCE}
        assert not wrong
    assert sorted(loads) == [2, 3, 4, 5], "numbers of the MoE layers, then of the MTP depth"
    for load, counts, z_loss in zip(
        (loads[number] for number in sorted(loads)),
        reference["counts"],
        reference["z_loss"],
        strict=True,
    ):
        assert load[0] == counts
        assert sum(load[0]) == reference["topk"] * reference["tokens"]
        assert load[1] == pytest.approx(z_loss, rel=1e-6)


def biases(overrides: list[str], num_steps: int) -> list[dict[int, Any]]:
    """Return {layer number: (dtype, counts, expert bias after)} of each step of this stage."""
    from ring_train.model.build import build_model
    from ring_train.model.router import routers
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step
    from tests.parallel.streams import make_micro_batches

    plan = short_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        steps = []
        for step in range(num_steps):
            rows = make_micro_batches(plan, step, groups.dp_rank)
            result = train_step(
                plan, model, optimizer, rows, groups.collection, step=step, num_domains=1
            )
            found = zip(result.loads.items(), routers(model), strict=True)
            steps.append(
                {
                    number: (str(load.counts.dtype), load.counts.tolist(), router.expert_bias)
                    for (number, load), router in found
                }
            )
            steps[-1] = {n: (d, c, bias.tolist()) for n, (d, c, bias) in steps[-1].items()}
        return steps


@pytest.mark.parametrize("zero_mean", [True, False])
def test_bias_moves_towards_starved_experts(zero_mean: bool, on_ranks: OnRanks) -> None:
    rate = 0.25
    words = [f"model.moe_router_bias_zero_mean={zero_mean}".lower()]
    words.append(f"model.moe_router_bias_update_rate={rate}")
    steps = on_ranks(1, biases, words, 3)[0]
    expected: dict[int, list[float]] = {number: [0.0] * 8 for number in steps[0]}
    for step in steps:
        for number, (dtype, counts, bias) in step.items():
            assert dtype == "torch.int64"
            mean = sum(counts) / len(counts)
            signs = [(mean > count) - (mean < count) for count in counts]
            shift = sum(signs) / len(signs) if zero_mean else 0.0
            expected[number] = [
                before + rate * (sign - shift)
                for before, sign in zip(expected[number], signs, strict=True)
            ]
            assert bias == pytest.approx(expected[number], abs=1e-6)
    if zero_mean:
        assert all(abs(sum(bias)) < 1e-6 for bias in expected.values())
    assert any(abs(sum(bias)) > 0.1 for bias in expected.values()) != zero_mean


def test_bias_is_the_same_under_every_layout(on_ranks: OnRanks) -> None:
    reference = on_ranks(1, biases, WHOLE, 3)[0]
    for overrides in ([], TP2, PP2, EP2, ["train.micro_batch_size=1"]):
        for steps in zip(*on_ranks(2, biases, overrides, 3), reference, strict=True):
            *stages, whole = steps
            assert {number: load for stage in stages for number, load in stage.items()} == whole


def counts_of_evaluation() -> tuple[int, float, bool]:
    """Return tokens counted by a forward without a loss, its loss, and whether it had a graph."""
    import torch

    from ring_train.model.build import build_model
    from ring_train.model.router import routers
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.step import forward_backward
    from tests.parallel.streams import make_micro_batches

    plan = short_plan([])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        graphs = []
        model[0].module.register_forward_hook(
            lambda module, args, out: graphs.append(out.requires_grad)
        )
        rows = make_micro_batches(plan, 0, 0)
        sums = forward_backward(model, rows, groups.collection, num_domains=1, loss_weights=None)
        counted = torch.stack([router.tokens_per_expert for router in routers(model)]).sum()
        return int(counted), float(sums.lm_loss), any(graphs)


def test_evaluation_counts_nothing_and_keeps_no_graph(on_ranks: OnRanks) -> None:
    ((counted, loss, has_graph),) = on_ranks(1, counts_of_evaluation)
    assert counted == 0
    assert loss == pytest.approx(6.3, abs=0.3)
    assert not has_graph
