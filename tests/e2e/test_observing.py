"""A run is seen while it trains and afterwards: status, pictures, profiles, slow ranks."""

import json
import shutil
from pathlib import Path

from tests.conftest import OnRanks
from tests.e2e.commands import run_job, succeed

PNG = b"\x89PNG\r\n"


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_profiled_run_computes_the_same(
    trained: Path, training: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = [*training, "parallel=ep2", f"run_dir={run_dir}", "train.stop_after_step=4"]
    words += ["profile=true", "logging.profile_steps=[3,3]", "logging.profile_ranks=[1]"]
    succeed(on_ranks, 2, "pretrain", words)
    whole = (trained / "metrics.jsonl").read_bytes().splitlines()
    assert (run_dir / "metrics.jsonl").read_bytes().splitlines() == whole[:4]
    made = sorted(path.name for path in (run_dir / "profile").iterdir())
    assert made == ["steps_3_to_3_rank_1.json.gz", "steps_3_to_3_rank_1_memory.txt"]
    assert "aten::mm" in (run_dir / "profile" / made[1]).read_text()


def test_a_run_under_way_is_profiled_on_request(
    training: list[str], on_ranks: OnRanks, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "profile.request").touch()
    succeed(on_ranks, 1, "pretrain", [*training, f"run_dir={run_dir}", "train.stop_after_step=3"])
    assert (run_dir / "profile" / "steps_2_to_3_rank_0.json.gz").stat().st_size > 1000
    assert not (run_dir / "profile.request").exists()


def test_a_run_leaves_what_status_and_pictures_are_made_of(
    trained: Path, on_ranks: OnRanks, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    (run_dir / "run.lock").unlink(missing_ok=True)
    assert all(len(r["step_s"]) == 2 for r in records(run_dir / "stragglers.jsonl"))
    outcome = succeed(on_ranks, 1, "status", [str(run_dir), f"json={tmp_path}/status.json"])
    for words in ("finished", "8 of 8 (100.0%)", "productive", "code", "math", "0 to 8"):
        assert words in outcome.stdout, outcome.stdout
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["tokens"]) == ("finished", 8, 2048)
    parts = status["goodput"]["parts_s"]
    assert abs(sum(parts.values()) - status["goodput"]["total_s"]) < 1e-3
    names = ("curves.png", "experts.png", "goodput.png", "stragglers.png")
    for name in names:
        (run_dir / name).unlink()
    drawn = succeed(on_ranks, 1, "plot", [f"run_dir={run_dir}"])
    assert drawn.stdout == "".join(f"{run_dir / name}\n" for name in names)
    assert all((run_dir / name).read_bytes().startswith(PNG) for name in names)


def test_what_is_no_run_is_refused(on_ranks: OnRanks, tmp_path: Path) -> None:
    for job in ("status", "plot"):
        outcome = run_job(on_ranks, 1, job, [f"run_dir={tmp_path}"])
        assert outcome.status == 2
        assert outcome.stderr.startswith(f"error: run_dir={tmp_path} is not a run folder")
    (tmp_path / "config.yaml").touch()
    outcome = run_job(on_ranks, 1, "plot", [f"run_dir={tmp_path}"])
    assert outcome.status == 2
    assert "has no records to draw yet" in outcome.stderr
