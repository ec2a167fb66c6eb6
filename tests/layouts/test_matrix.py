"""Loss, every gradient and the expert-bias update of every kind of layout are those of one rank.

`make test` compares SAMPLE; `make test-layouts` compares the whole table and, if all of it is
equal, writes docs/layouts.md and ring_train/plan/certified_layouts.json, from which the plan knows
what is covered.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ring_train.plan.coverage import TABLE_FILE, kind_name, layout_features
from tests.conftest import OnRanks
from tests.layouts.matrix import (
    VARIANTS,
    Layout,
    all_layouts,
    matrix_plan,
    run_layout,
    worst_errors,
)
from tests.layouts.page import write_page

LOSS_TOLERANCE = 1e-6
"""Relative. fp32 sums of 256 tokens in another order; measured 1e-8."""
GRADIENT_TOLERANCE = 1e-5
"""Relative, L2, per parameter, fp32. Measured 1e-6, at the norms of keys, whose gradient is a
difference of larger terms."""
SMALLEST_MARGIN = 2e-5
"""Between the scores of a chosen and the best rejected expert; fp32 scores are off by 1e-6."""
TIMEOUT_S = 280.0

SAMPLE = {
    "tp2_pp2_ep2-plain",
    "pp2_vpp2-plain",
    "cp2-plain",
    "ep2_cp2-full",
    "tp2_pp2_vpp2_ep2-full",
    "tp2_ep2_etp2_dp2-plain",
    "pp2_cp2-full",
    "tp2_cp2-selective",
    "ep2_dp2-full",
    "dp2-selective",
    "cp4-plain",
    "pp2_ep2_cp2_dp2-full",
    "one_rank-full",
    "tp2_pp2_ep2-v1",
    "cp2-v1",
}
PAGE = Path(__file__).parents[2] / "docs" / "layouts.md"
ALL = bool(os.environ.get("ALL_LAYOUTS"))
LAYOUTS = {layout.name: layout for layout in all_layouts()}


class Measured:
    """What this session has compared."""

    def __init__(self) -> None:
        self.references: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, dict[str, Any]] = {}


@pytest.fixture(scope="module")
def measured() -> Iterator[Measured]:
    found = Measured()
    yield found
    if found.rows.keys() == LAYOUTS.keys():
        write_table(found.rows)


def reference_of(variant: str, on_ranks: OnRanks, measured: Measured) -> dict[str, Any]:
    """Return what one rank computes, checked to be worth comparing with."""
    if variant not in measured.references:
        reference = on_ranks(1, run_layout, None, variant)[0]
        assert reference["margin"] > SMALLEST_MARGIN
        zeros = [name for name, grad in reference["gradients"].items() if not grad.any()]
        assert not zeros, "nothing is compared where all is zero"
        assert all(bias.any() for bias in reference["biases"].values())
        measured.references[variant] = reference
    return measured.references[variant]


@pytest.mark.parametrize("name", LAYOUTS if ALL else sorted(SAMPLE))
def test_a_layout_computes_what_one_rank_does(
    name: str, measured: Measured, on_ranks: OnRanks
) -> None:
    layout = LAYOUTS[name]
    reference = reference_of(layout.variant, on_ranks, measured)
    results = on_ranks(layout.num_ranks, run_layout, layout, layout.variant, timeout_s=TIMEOUT_S)
    seen, worst = set(), (0.0, 0.0, "")
    for found in results:
        loss, gradient, parameter = worst_errors(found, reference)
        assert loss <= LOSS_TOLERANCE
        assert gradient <= GRADIENT_TOLERANCE, parameter
        worst = max(worst, (gradient, loss, parameter))
        unequal = [
            n for n, bias in found["biases"].items() if not bias.equal(reference["biases"][n])
        ]
        assert not unequal
        assert found["grad_norm"] == pytest.approx(reference["grad_norm"], rel=GRADIENT_TOLERANCE)
        assert found["counts"].items() <= reference["counts"].items()
        seen |= found["gradients"].keys() | found["biases"].keys()
    assert seen == reference["gradients"].keys() | reference["biases"].keys()
    measured.rows[name] = {
        "layout": layout,
        "features": features_of(layout),
        "gradient_error": worst[0],
        "loss_error": worst[1],
        "parameter": worst[2],
    }


def features_of(layout: Layout) -> Any:
    plan = matrix_plan(layout, layout.variant, layout.num_ranks)
    return layout_features(plan.config, plan.mesh)


def write_table(rows: dict[str, dict[str, Any]]) -> None:
    """Write what was measured: the page for people, the list for the plan."""
    from ring_train.plan.fields import snapshot

    kinds: dict[tuple[str, ...], set[str]] = {}
    for row in rows.values():
        kinds.setdefault(row["features"].kind, set()).update(row["features"].flags)
    version = snapshot()["megatron_core"]
    lines = [json.dumps({"kind": kind, "flags": sorted(kinds[kind])}) for kind in kinds]
    TABLE_FILE.write_text(
        f'{{"megatron_core": "{version}", "kinds": [\n' + ",\n".join(lines) + "\n]}\n",
        encoding="ascii",
    )
    write_page(PAGE, rows)


def test_the_committed_table_says_what_the_page_shows() -> None:
    """The plan lets pass what was compared, and nothing else."""
    page = PAGE.read_text(encoding="ascii")
    shown = [layout for name, layout in LAYOUTS.items() if f"| {name} |" in page]
    plain = {layout.name for layout in LAYOUTS.values() if layout.variant == "plain"}
    assert plain <= {layout.name for layout in shown}
    expected: dict[tuple[str, ...], set[str]] = {}
    for layout in shown:
        features = features_of(layout)
        expected.setdefault(features.kind, set()).update(features.flags)
    table = json.loads(TABLE_FILE.read_text(encoding="ascii"))["kinds"]
    assert {tuple(row["kind"]): set(row["flags"]) for row in table} == expected
    assert all(f"`{kind_name(kind)}`" in page for kind in expected)


def test_the_sample_has_every_degree_and_variant() -> None:
    chosen = [LAYOUTS[name] for name in SAMPLE]
    degrees = {name for layout in chosen for name, _ in layout.degrees}
    assert degrees == {"tp", "pp", "vpp", "ep", "etp", "cp", "dp"}
    assert {layout.variant for layout in chosen} == VARIANTS.keys()
    assert len(LAYOUTS) >= 60
