"""The trainer reproduces what independent reference code computes, under every layout.

Folders, figures and tolerances: tests/golden/README.md. The job under test is `score`, as a user
runs it; these tests never skip.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OnRanks

GOLDEN = Path(__file__).parents[1] / "golden"
NOISE_FACTOR = 5.0
"""Largest log-probability difference in noise floors (golden/README)."""
LOSS_TOLERANCE = 1e-5
"""Absolute (golden/README)."""
GRADIENT_TOLERANCE = 5e-5
"""Relative gradient norm (golden/README)."""
ZERO_NORM_TOLERANCE = 1e-6
"""Absolute, where the norm is 0 (golden/README)."""

CASES = {
    "ling": ("ling_v2", "expected.json", None),
    "ring_zero_based": ("ring_linear_v2", "expected.json", "zero_based"),
    "ring_shifted": ("ring_linear_v2", "expected_hf_rule.json", "shifted"),
    "ring_lite": ("ring_lite_v1", "expected.json", None),
}
TP2 = ["parallel.tensor_model_parallel_size=2"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
EP2 = ["parallel.expert_model_parallel_size=2"]
CP2 = ["parallel.context_parallel_size=2"]
VPP2 = ["parallel.virtual_pipeline_model_parallel_size=2"]
LAYOUTS = {
    "one_rank": (1, []),
    "tp2_sp": (2, TP2),
    "pp2": (2, PP2),
    "ep2": (2, EP2),
    "cp2": (2, CP2),
    "cp2_ep2": (2, [*CP2, *EP2]),
    "pp2_vpp2": (2, [*PP2, *VPP2]),
    "tp2_pp2_ep2": (4, [*TP2, *PP2, *EP2]),
}
FIRST_GENERATION = ("one_rank", "tp2_sp", "pp2", "ep2", "cp2", "tp2_pp2_ep2")
"""Layouts of ring_lite: its parts meet no other collective than theirs."""


def run_score(words: list[str]) -> None:
    from ring_train.jobs import score

    score.main(words)


def score_case(
    on_ranks: OnRanks, folder: Path, case: str, layout: str, *, packed: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return (scores, gradients, expected part of the golden file) of one case."""
    name, file, rule = CASES[case]
    expected = json.loads((GOLDEN / name / file).read_text())
    part = expected["packed_pair"] if packed else expected
    prompts = folder / "prompts.json"
    prompts.write_text(json.dumps({"prompts": part["documents" if packed else "prompts"]}))
    ranks, overrides = LAYOUTS[layout]
    words = [
        f"hf_dir={GOLDEN / name}",
        f"prompts={prompts}",
        f"output={folder / 'scores.json'}",
        f"grad_norms={folder / 'gradients.json'}",
        f"packed={str(packed).lower()}",
        *([f"decay_layer_rule={rule}"] if rule else []),
        *overrides,
    ]
    on_ranks(ranks, run_score, words)
    scores = json.loads((folder / "scores.json").read_text())
    gradients = json.loads((folder / "gradients.json").read_text())
    return scores, gradients, {**part, "noise_floor": expected["noise_floor"]}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize(
    ("case", "layout"),
    [(c, name) for c in CASES for name in (FIRST_GENERATION if c == "ring_lite" else LAYOUTS)],
)
def test_score_meets_the_golden_figures(
    case: str, layout: str, packed: bool, on_ranks: OnRanks, tmp_path: Path
) -> None:
    scores, gradients, expected = score_case(on_ranks, tmp_path, case, layout, packed=packed)
    limit = NOISE_FACTOR * expected["noise_floor"]
    for key in ("logprobs", "mtp_logprobs"):
        assert (key in scores) == (key in expected)
        if key not in expected:
            continue
        assert len(scores[key]) == len(expected[key])
        for ours, reference in zip(scores[key], expected[key], strict=True):
            assert ours == pytest.approx(reference, abs=limit, rel=0), key
    for prefix in ("", "mtp_"):
        if f"{prefix}grad_norms" not in expected:
            continue
        loss, reference_loss = gradients[f"{prefix}loss"], expected[f"{prefix}loss"]
        assert loss == pytest.approx(reference_loss, abs=LOSS_TOLERANCE, rel=0)
        assert gradients[f"{prefix}grad_norms"] == pytest.approx(
            expected[f"{prefix}grad_norms"], rel=GRADIENT_TOLERANCE, abs=ZERO_NORM_TOLERANCE
        )


@pytest.mark.parametrize("wrong", ["shifted", "zero_based"])
def test_the_other_decay_rule_is_far_off(wrong: str, on_ranks: OnRanks, tmp_path: Path) -> None:
    """The comparison can fail: the rules differ by far more than the tolerance."""
    case = "ring_zero_based" if wrong == "shifted" else "ring_shifted"
    name, file, _ = CASES[case]
    expected = json.loads((GOLDEN / name / file).read_text())
    prompts, output = tmp_path / "prompts.json", tmp_path / "scores.json"
    prompts.write_text(json.dumps({"prompts": expected["prompts"]}))
    words = [f"hf_dir={GOLDEN / name}", f"prompts={prompts}", f"output={output}"]
    on_ranks(1, run_score, [*words, f"decay_layer_rule={wrong}"])
    scores = json.loads(output.read_text())["logprobs"]
    differences = [
        abs(a - b)
        for ours, reference in zip(scores, expected["logprobs"], strict=True)
        for a, b in zip(ours, reference, strict=True)
    ]
    assert max(differences) > 0.1
