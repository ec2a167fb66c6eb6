import json
from pathlib import Path

import pytest

from ring_train.errors import UserError
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
