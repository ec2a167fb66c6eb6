"""Tensor parallelism inside experts: losses, gradients, counts and training match one rank.

Gradients in fp64, for the reasons of test_gradients.
"""

from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import (
    DISTRIBUTED_OPTIMIZER,
    EP2,
    PP2,
    TP2,
    gradients_by_name,
    relative_errors,
)
from tests.parallel.test_gradients import GRADIENT_TOLERANCE, LOSS_TOLERANCE, SMALLEST_MARGIN
from tests.parallel.test_training_layouts import FIGURES, reference_run, train
from tests.parallel.test_training_layouts import LOSS_TOLERANCE as TOLERANCE

BASE = ["model.mtp_num_layers=2", "train.micro_batch_size=1", "model.moe_z_loss_coeff=3.0"]
ETP2 = ["parallel.expert_tensor_parallel_size=2"]
VPP2 = ["parallel.virtual_pipeline_model_parallel_size=2"]
LAYOUTS = {
    "etp2": (2, ETP2, 1),
    "etp2_padded": (2, ETP2, 40),
    "tp2_etp2": (2, [*TP2, *ETP2], 1),
    "ep2_etp2": (4, [*EP2, *ETP2], 1),
    "tp2_ep2_etp2": (4, [*TP2, *EP2, *ETP2], 1),
    "tp2_pp2_vpp2_etp2": (4, [*TP2, *PP2, *VPP2, *ETP2], 1),
}
"""(ranks, overrides, tokens that rows are padded to a multiple of)."""


def gradients(overrides: list[str], pad_to_multiple: int) -> dict[str, Any]:
    return gradients_by_name([*BASE, *overrides], pad_to_multiple=pad_to_multiple)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_gradients_and_counts_match_one_rank(
    layout: str, found: dict[str, Any], fp64: None, on_ranks: OnRanks
) -> None:
    if not found:
        found.update(on_ranks(1, gradients, [], 1)[0])
        assert found["margin"] > SMALLEST_MARGIN
    ranks, overrides, multiple = LAYOUTS[layout]
    seen: set[str] = set()
    loads: dict[int, Any] = {}
    for result in on_ranks(ranks, gradients, overrides, multiple):
        assert result["losses"] == pytest.approx(found["losses"], abs=LOSS_TOLERANCE, rel=0)
        errors = relative_errors(result["gradients"], found["gradients"])
        assert not {n: error for n, error in errors.items() if error > GRADIENT_TOLERANCE}
        seen |= result["gradients"].keys()
        loads |= result["loads"]
    assert seen == found["gradients"].keys()
    assert {n: load[0] for n, load in loads.items()} == {
        n: load[0] for n, load in found["loads"].items()
    }


NUM_STEPS = 5
TRAINED = {
    "tp2_etp2": (2, [*TP2, *ETP2]),
    "tp2_ep2_etp2_distributed_optimizer": (4, [*TP2, *EP2, *ETP2, *DISTRIBUTED_OPTIMIZER]),
}


@pytest.fixture(scope="module")
def reference() -> dict[str, list[float]]:
    return {}


@pytest.mark.parametrize("layout", TRAINED)
def test_training_matches_one_rank(
    layout: str, reference: dict[str, list[float]], on_ranks: OnRanks
) -> None:
    expected = reference_run(on_ranks, reference)
    ranks, overrides = TRAINED[layout]
    for figures in on_ranks(ranks, train, overrides, NUM_STEPS):
        for key in FIGURES:
            found = figures[key]
            assert found == pytest.approx(expected[key][:NUM_STEPS], abs=TOLERANCE, rel=0), key


def uneven_collectives(sizes: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Return what a gather and its backward, and a reduce-scatter, give of parts of these sizes."""
    import torch
    import torch.distributed as dist
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    group, rank = dist.group.WORLD, dist.get_rank()
    part = torch.full((sizes[rank], 2), rank + 1.0, requires_grad=True)
    whole = gather_from_sequence_parallel_region(part, group=group, output_split_sizes=sizes)
    weights = torch.arange(whole.shape[0], dtype=torch.float32)[:, None] * (rank + 1)
    (whole * weights).sum().backward()
    assert part.grad is not None
    scattered = reduce_scatter_to_sequence_parallel_region(
        weights.clone(), group=group, input_split_sizes=sizes
    )
    return whole[:, 0].tolist(), part.grad[:, 1].tolist(), scattered[:, 0].tolist()


@pytest.mark.parametrize("sizes", [[2, 0, 3], [0, 0, 1], [2, 2, 2]])
def test_parts_of_any_length_are_gathered_and_added_up(sizes: list[int], on_ranks: OnRanks) -> None:
    whole = [float(rank + 1) for rank, size in enumerate(sizes) for _ in range(size)]
    for rank, (gathered, gradient, scattered) in enumerate(on_ranks(3, uneven_collectives, sizes)):
        first = sum(sizes[:rank])
        expected = [6.0 * row for row in range(first, first + sizes[rank])]
        assert (gathered, gradient, scattered) == (whole, expected, expected)
