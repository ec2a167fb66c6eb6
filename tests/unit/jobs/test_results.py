"""A file of results that cannot be written is found early, and leaves nothing half written."""

from pathlib import Path

import pytest

from ring_train.errors import UserError
from ring_train.jobs.evaluate import main
from ring_train.jobs.results import check_writable, write_json


@pytest.mark.parametrize("key", ["output", "answers"])
def test_evaluate_checks_its_files_before_it_reads_a_model(key: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    words = [f"checkpoint={tmp_path}/nowhere", "evaluation.problems.math=x"]
    with pytest.raises(UserError, match=rf"{key}={tmp_path}: {tmp_path} is a folder; name a file"):
        main([*words, f"{key}={tmp_path}"])
    with pytest.raises(
        UserError, match=rf"{key}=.*/file/a/b.json cannot be written: .*/file is no"
    ):
        main([*words, f"{key}={tmp_path}/file/a/b.json"])
    with pytest.raises(UserError, match=r"output and answers are both .*/x; name two files"):
        main([*words, f"output={tmp_path}/x", f"answers={tmp_path}/x"])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_can_be_written_is_left_alone(tmp_path: Path) -> None:
    check_writable("output", f"{tmp_path}/new/folder/x.json")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_failed_write(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(UserError, match=r"/x cannot be written .*; name another file"):
        write_json(f"{tmp_path}/x", {})
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
