"""`verify_export` as a shell runs it: on the export of a real run, and on spoilt copies of it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import OnRanks
from tests.e2e.commands import Outcome, contents, run_command
from tests.exports.mutants import MUTANTS

DIFFERS_STATUS = 1
TIMEOUT_S = 280
"""Of a command that starts another interpreter, which imports transformers."""


def certify(on_ranks: OnRanks, folder: Path, *words: str) -> Outcome:
    words = (f"hf_dir={folder}", *words)
    job = "ring_train.jobs.verify_export"
    return on_ranks(1, run_command, job, list(words), timeout_s=TIMEOUT_S)[0]


def certificate(folder: Path) -> dict:
    return json.loads((folder / "certificate.json").read_text())


def test_an_export_is_certified_against_its_checkpoint(
    trained: Path, exported: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    outcome = certify(on_ranks, folder, f"checkpoint={trained}")
    assert outcome.status == 0, outcome.stdout + outcome.stderr
    found = certificate(folder)
    assert found["passed"]
    assert found["source"]["checkpoint_step"] == 8
    assert {check["status"] for check in found["checks"].values()} == {"passed", "not run"}
    not_run = {name for name, check in found["checks"].items() if check["status"] == "not run"}
    assert not_run == {"vllm_one_pass", "vllm_prefill_in_pieces", "vllm_token_by_token"}
    assert str(tmp_path) not in json.dumps(found)
    before = contents(exported)
    assert {k: v for k, v in contents(folder).items() if k != "certificate.json"} == before


def test_what_a_folder_alone_cannot_tell_is_said(
    exported: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    shutil.copytree(exported, folder)
    alone = certify(on_ranks, folder)
    assert alone.status == 0, alone.stdout + alone.stderr
    assert certificate(folder)["source"] == "folder only"
    assert certificate(folder)["checks"]["weights"]["status"] == "not run"


@pytest.mark.parametrize("name", ["gate_up_swapped", "interleaved_rope_in_code"])
def test_a_spoilt_export_fails_and_says_where(
    name: str, trained: Path, exported: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    folder = tmp_path / name
    shutil.copytree(exported, folder)
    MUTANTS[name].change(folder)
    outcome = certify(on_ranks, folder, f"checkpoint={trained}")
    assert outcome.status == DIFFERS_STATUS, outcome.stdout + outcome.stderr
    assert f"failed   {MUTANTS[name].noticed_by}" in outcome.stdout
    assert not certificate(folder)["passed"]


def test_a_folder_that_is_none_is_refused(
    exported: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    outcome = certify(on_ranks, tmp_path / "empty")
    assert outcome.status == 2
    assert "has no config.json; name an exported folder" in outcome.stderr
    assert list((tmp_path / "empty").iterdir()) == []
    (tmp_path / "ids.json").write_text('{"prompts": [[1, 100000000]]}')
    outcome = certify(on_ranks, exported, f"prompts={tmp_path / 'ids.json'}")
    assert outcome.status == 2
    assert "token id 100000000 is outside vocab_size" in outcome.stderr
    outcome = certify(on_ranks, exported, f"checkpoint={exported}")
    assert outcome.status == 2
    assert "is a Hugging Face folder; name the checkpoint" in outcome.stderr
    assert not (exported / "certificate.json").exists()
