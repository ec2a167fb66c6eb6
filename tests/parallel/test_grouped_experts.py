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
