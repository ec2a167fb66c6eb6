"""`kill -9` of a merge at random moments: the output is whole or not there, and the merge goes on.

CRASH_KILLS is the number of kills: 5 unless set; `make test-crash` sets more.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
import warnings
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from ring_train.checkpoint import merging
from ring_train.checkpoint.manifest import read_manifest
from ring_train.checkpoint.reading import tensor_digests
from ring_train.config import DecayCurve
from tests.unit.checkpoint.small_checkpoints import save
from tests.unit.checkpoint.test_merging import merge

NUM_KILLS = int(os.environ.get("CRASH_KILLS", "5"))
NUM_TENSORS, NUM_ELEMENTS = 30, 20_000

pytestmark = pytest.mark.timeout(120 + 5 * NUM_KILLS)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    for step in (10, 20, 30):
        tensors = {
            f"weight/{number:02d}.weight": torch.randn(NUM_ELEMENTS, generator=generator)
            for number in range(NUM_TENSORS)
        }
        save(tmp_path, step, tensors)
    return tmp_path


def start_merge(run_dir: Path, output: Path) -> BaseProcess:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=merge, args=(run_dir, output, DecayCurve.cosine))
    with warnings.catch_warnings():
        # As in tests/conftest.py: threads of pools, idle here.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded")
        process.start()
    return process


def test_a_killed_merge_goes_on(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)  # a fork has no pool
    monkeypatch.setattr(merging, "PART_BYTES", 3 * NUM_ELEMENTS * 4)
    started = time.monotonic()
    whole = start_merge(run_dir, run_dir / "whole")
    whole.join()
    typical_s = time.monotonic() - started
    expected = tensor_digests(run_dir / "whole", read_manifest(run_dir / "whole"))
    assert len(expected) == NUM_TENSORS
    rng, output, torn = random.Random(0), run_dir / "merged", 0
    for _ in range(NUM_KILLS):
        process = start_merge(run_dir, output)
        time.sleep(rng.uniform(0, typical_s))
        process.kill()
        process.join()
        if output.exists():
            assert tensor_digests(output, read_manifest(output)) == expected
            shutil.rmtree(output)
        torn += any(run_dir.glob("merged.*.partial"))
    merge(run_dir, output, DecayCurve.cosine)
    assert tensor_digests(output, read_manifest(output)) == expected
    assert not any(run_dir.glob("merged.*.partial"))
    if NUM_KILLS >= 20:
        assert torn, "no kill fell into a merge"
