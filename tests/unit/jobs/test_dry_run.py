"""dry_run prints a plan quickly, without torch, and says why it cannot."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ring_train.jobs.dry_run import main, pattern

CPU_LIMIT_S = 3.0
PROBE = """
import sys
from ring_train.jobs.dry_run import main
status = main(sys.argv[1:])
assert status == 0, status
assert not {"torch", "megatron", "transformers", "numpy"} & sys.modules.keys()
"""


def test_it_needs_neither_torch_nor_three_seconds() -> None:
    words = ["experiment=ring_flash_linear_512gpu", "world_size=512"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", PROBE, *words], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_LIMIT_S


def test_the_table_shows_what_a_reader_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=ring_flash_linear_512gpu", "world_size=512"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "lllllllg lllllllg lllllllg lllllllg",
        "512 = tp 4 x pp 4 x cp 1 x dp 32 (experts: etp 1 x pp 4 x ep 16 x dp 8)",
        "3: layers 30-31, output, 1 MTP  (2, 0.96 of the mean cost)",
        "104,181,665,536 (104.2B)",
        "261 micro batches of 1 per rank",
        "kernels         standard",
    ):
        assert part in shown
    assert max(len(line) for line in shown.splitlines()) <= 120


def test_the_table_shows_chunks_recomputation_overlap_and_kernels(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["model=ring_mini_linear_2_0", "parallel=pp2", "parallel.overlap_grad_reduce=true"]
    words += ["parallel.virtual_pipeline_model_parallel_size=2"]
    words += ["parallel.recompute_granularity=full", "parallel.recompute_method=block"]
    words += ["kernels.lightning=torch", "kernels.experts=sequential"]
    assert main([*words, "parallel.recompute_num_layers=2"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "rank 0 chunk 1: layers 9-19  (11, 1.29 of the mean cost)",
        "rank 1 chunk 1: no layers, output, 1 MTP  (0, 1.65 of the mean cost)",
        "busiest: rank 1, 1.00 of the mean cost",
        "recomputed      the first 2 layers of each stage, and MTP",
        "sharding        overlapped gradient reduction",
        "kernels         lightning torch, experts sequential",
    ):
        assert part in shown


def test_json_has_the_counts_at_the_top(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert main(["model=ring_mini_linear_2_0", f"json={path}"]) == 0
    plan = json.loads(path.read_text())
    assert plan["num_parameters"] == 16_423_448_320
    assert plan["num_active_parameters"] == 1_600_777_984
    assert plan["num_active_non_embedding_parameters"] == 956_952_320
    assert plan["num_mtp_parameters"] == 827_861_504
    assert plan["mesh"]["world_size"] == 1


def test_without_world_size_it_takes_the_fewest_ranks(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    words = ["model=tiny", "parallel=tp2", "parallel.expert_model_parallel_size=4"]
    assert main([*words, f"json={path}"]) == 0
    assert json.loads(path.read_text())["mesh"]["world_size"] == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=tinny"], "error: model=tinny is not a preset; did you mean tiny?"),
        (["model=tiny", "world_size=3", "parallel=tp2"], "world_size=3 is not divisible"),
        (["model=tiny", "parallel.tensor_model_parallel_size=0"], "is not positive"),
        (["model=tiny", "json=nowhere/plan.json"], "json=nowhere/plan.json cannot be written"),
        ([], "model=PRESET is missing"),
    ],
)
def test_an_illegal_plan_is_status_2_and_one_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_a_pattern_is_one_letter_a_layer() -> None:
    mixers = ("lightning", "gqa") * 2
    assert pattern(mixers, 2) == "lg lg  (l = lightning x 2, g = gqa x 2)"
