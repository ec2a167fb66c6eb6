"""The comparison of layouts notices faults: each mutant runs to its end and must fail it.

`make test` tries SAMPLE, `make test-layouts` all, and writes what it found into docs/layouts.md.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.layouts.matrix import run_layout, worst_errors
from tests.layouts.mutants import MUTANTS, run_mutant
from tests.layouts.page import write_mutants
from tests.layouts.test_matrix import ALL, GRADIENT_TOLERANCE, LOSS_TOLERANCE, PAGE

SAMPLE = ("gate_norm_stored_as_replicated", "state_decays_one_token_too_much")
TIMEOUT_S = 60.0


class Found:
    """What this session has tried."""

    def __init__(self) -> None:
        self.references: dict[str, Any] = {}
        self.noticed: dict[str, str] = {}


@pytest.fixture(scope="module")
def found() -> Iterator[Found]:
    tried = Found()
    yield tried
    if tried.noticed.keys() == MUTANTS.keys():
        write_mutants(PAGE, {MUTANTS[name]: how for name, how in tried.noticed.items()})


@pytest.mark.parametrize("name", MUTANTS if ALL else SAMPLE)
def test_a_fault_is_noticed(name: str, found: Found, on_ranks: OnRanks) -> None:
    layout = MUTANTS[name].layout
    if layout.variant not in found.references:
        found.references[layout.variant] = on_ranks(1, run_layout, None, layout.variant)[0]
    reference = found.references[layout.variant]
    results = on_ranks(layout.num_ranks, run_mutant, name, timeout_s=TIMEOUT_S)
    found.noticed[name] = " and ".join(sorted(_differences(results, reference))) or "-"
    assert found.noticed[name] != "-"


def _differences(results: list[dict[str, Any]], reference: dict[str, Any]) -> set[str]:
    """Return which of the compared figures differ."""
    differing = set()
    for result in results:
        loss, gradient, _ = worst_errors(result, reference)
        if not loss <= LOSS_TOLERANCE:
            differing.add("loss")
        if not gradient <= GRADIENT_TOLERANCE:
            differing.add("gradient")
        if any(not bias.equal(reference["biases"][n]) for n, bias in result["biases"].items()):
            differing.add("expert bias")
        if not result["counts"].items() <= reference["counts"].items():
            differing.add("expert counts")
        if result["grad_norm"] != pytest.approx(reference["grad_norm"], rel=GRADIENT_TOLERANCE):
            differing.add("gradient norm")
    return differing


def test_enough_faults_are_tried() -> None:
    assert len(MUTANTS) >= 20
    assert all(mutant.fault for mutant in MUTANTS.values())
