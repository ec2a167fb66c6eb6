"""Triton kernels compile for the GPUs that we name, which needs none: bench/kernels_aot.py."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.kernels_aot import TARGETS, Row, occupancy, without_fit
from tests.repo.files import ROOT

FITTING = Row(
    family="lightning",
    case="bfloat16",
    kernel="output_kernel",
    flags="",
    target="sm_90",
    num_warps=4,
    num_stages=1,
    registers=168,
    spill_bytes=0,
    shared_bytes=80 * 1024,
    programs_per_multiprocessor=2,
    wgmma=28,
    mma=0,
    compile_s=1.0,
)
TOO_LARGE = dataclasses.replace(FITTING, num_stages=4, programs_per_multiprocessor=0)


@pytest.mark.slow
def test_kernels_compile_for_both_generations_and_use_tensor_cores(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    words = ["families=lightning", "case=bfloat16, documents", "kernels=output_kernel,carry_kernel"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "bench/kernels_aot.py", *words, f"output={output}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [Row(**row) for row in json.loads(output.read_text())["rows"]]
    assert {(row.kernel, row.target) for row in rows} == {
        (kernel, target) for kernel in ("output_kernel", "carry_kernel") for target in TARGETS
    }
    for target, (wgmma, mma) in {"sm_90": (True, False), "sm_80": (False, True)}.items():
        products = [r for r in rows if r.target == target and r.kernel == "output_kernel"]
        assert len(products) == 4, "candidates"
        assert all((r.wgmma > 0, r.mma > 0) == (wgmma, mma) for r in products)
        assert all(0 < r.shared_bytes <= TARGETS[target].shared_bytes for r in products)
        assert min(r.spill_bytes for r in products) == 0
        assert all(32 <= r.registers <= 255 for r in products)
    passes = {row.flags for row in rows if row.kernel == "carry_kernel"}
    assert passes == {"MANY", "REVERSE MANY"}


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "expected"),
    [(168, 80 * 1024, 2), (168, 0, 3), (32, 0, 16), (168, 228 * 1024, 0)],
)
def test_programs_that_fit_on_a_multiprocessor(
    registers: int, shared_bytes: int, expected: int
) -> None:
    # 4 warps x 32 threads x 168 registers = 21504 of 65536; 80 + 1 KiB of 228.
    assert occupancy(TARGETS["sm_90"], 4, registers, shared_bytes) == expected


def test_a_kernel_of_which_no_candidate_fits_is_named() -> None:
    assert without_fit([FITTING, TOO_LARGE]) == []
    assert without_fit([TOO_LARGE]) == ["sm_90 lightning bfloat16 output_kernel "]
