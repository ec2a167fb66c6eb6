"""Every gradient, by logical name, is that of one rank; so is every initial weight.

Computed in fp64, where rounding cannot excuse a difference: in fp32 the gradients of the tiny model
differ by up to 2e-5, because the group norm of lightning attention is ill-conditioned at the first
token of a document. Gradients are still accumulated in fp32 and the cross-entropy is fp32.
"""

from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import (
    EP2,
    PP2,
    TP2,
    gradients_by_name,
    relative_errors,
    short_plan,
    weights_by_name,
)

if TYPE_CHECKING:
    import torch

GRADIENT_TOLERANCE = 1e-6
"""Relative, L2: one rounding to fp32 per micro batch and rank, and that of the cross-entropy."""
LOSS_TOLERANCE = 1e-6
"""Absolute, of losses near 6: the cross-entropy of each token is rounded to fp32."""
SMALLEST_MARGIN = 1e-6
"""Above the rounding of fp64 scores by far."""
TWO_DEPTHS = ["model.mtp_num_layers=2"]
LAYOUTS = {
    "dp2": (2, []),
    "tp2_sp": (2, TP2),
    "pp2": (2, PP2),
    "ep2": (2, EP2),
    "one_micro_batch": (1, ["train.micro_batch_size=4"]),
    "four_micro_batches": (1, ["train.micro_batch_size=1"]),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_of_two_mtp_depths_match_one_rank(
    layout: str, found: dict[str, Any], fp64: None, on_ranks: OnRanks
) -> None:
    if not found:
        found.update(on_ranks(1, gradients_by_name, TWO_DEPTHS)[0])
        assert found["margin"] > SMALLEST_MARGIN
        assert {name.split(".")[2] for name in found["gradients"] if "mtp" in name} == {"0", "1"}
        zeros = [name for name, grad in found["gradients"].items() if not grad.any()]
        assert not zeros, "nothing is compared where all is zero"
    ranks, overrides = LAYOUTS[layout]
    seen = set()
    for result in on_ranks(ranks, gradients_by_name, [*TWO_DEPTHS, *overrides]):
        assert result["losses"] == pytest.approx(found["losses"], abs=LOSS_TOLERANCE, rel=0)
        errors = relative_errors(result["gradients"], found["gradients"])
        wrong = {name: error for name, error in errors.items() if error > GRADIENT_TOLERANCE}
        assert not wrong
        seen |= result["gradients"].keys()
    assert seen == found["gradients"].keys()


def initial_weights(layouts: list[list[str]]) -> list[dict[str, "torch.Tensor"]]:
    """Return the initial weights of each layout."""
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime

    weights = []
    for overrides in layouts:
        plan = short_plan([*TWO_DEPTHS, *overrides])
        with start_runtime(plan) as groups:
            weights.append(weights_by_name(build_model(plan, groups.collection)))
    return weights


def test_initial_weights_are_the_same_under_every_layout(on_ranks: OnRanks) -> None:
    reference = on_ranks(1, initial_weights, [[]])[0][0]
    layouts = [[], TP2, PP2, EP2, [*TP2, *EP2]]
    for overrides, *parts in zip(layouts, *on_ranks(2, initial_weights, layouts), strict=True):
        for part in parts:
            differing = [name for name, weight in part.items() if not weight.equal(reference[name])]
            assert not differing, overrides
        assert set().union(*parts) == reference.keys(), overrides


def test_initial_weights_depend_on_seed_and_name(on_ranks: OnRanks) -> None:
    first, second = on_ranks(1, initial_weights, [[], ["seed=37"]])[0]
    experts = [f"decoder.layers.2.mlp.experts.{j}.linear_fc1.weight" for j in range(8)]
    assert not any(first[name].equal(second[name]) for name in experts)
    assert not first[experts[0]].equal(first[experts[1]])
    assert float(first[experts[0]].std()) == pytest.approx(0.05, rel=0.05)
    scaled = first["decoder.layers.2.self_attention.linear_proj.weight"].std()
    assert float(scaled) == pytest.approx(0.05 / 8**0.5, rel=0.05)
