import json
import math
from pathlib import Path

import pytest

from ring_train.errors import UserError
from ring_train.hf.certificate.consumers import compare_scores
from ring_train.hf.certificate.record import Check, write_certificate


def test_a_check_says_what_it_found_and_what_it_did_not_do() -> None:
    lines = list(Check(name="rope", differences=["a"] * 10).lines())
    assert lines[0] == "failed   rope\n"
    assert lines[-1].strip() == "and 2 more"
    skipped = Check(name="vllm", not_run="no vLLM here")
    assert skipped.record() == {"status": "not run", "reason": "no vLLM here"}
    assert Check(name="x", figures={"largest_difference": 1e-5}).record() == {
        "status": "passed",
        "largest_difference": 1e-5,
    }


def test_a_certificate_appears_whole(tmp_path: Path) -> None:
    path = write_certificate(tmp_path, {"passed": True})
    assert json.loads(path.read_text()) == {"passed": True}
    assert [entry.name for entry in tmp_path.iterdir()] == ["certificate.json"]


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "certificate.json").mkdir()
    with pytest.raises(UserError, match=r"certificate\.json cannot be written"):
        write_certificate(tmp_path, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["certificate.json"]


def test_scores_differ_by_position_and_never_pass_as_nan() -> None:
    wanted = [[-1.0, -2.0], [-3.0]]
    assert compare_scores("x", wanted, wanted) == ([], 0.0)
    lines, largest = compare_scores("x", [[-1.0, -2.5], [-3.0]], wanted)
    assert largest == 0.5
    assert lines == [
        "x, row 0 of 3 tokens: 1 log-probabilities differ, most at token 2: -2.500000, "
        "not -2.000000"
    ]
    for wrong in (math.nan, -math.inf):
        lines, largest = compare_scores("x", [[wrong, -2.0], [-3.0]], wanted)
        assert lines
        assert largest == math.inf
    assert compare_scores("x", [[-1.0], [-3.0]], wanted)[1] == math.inf
    assert compare_scores("x", [], wanted)[1] == math.inf
