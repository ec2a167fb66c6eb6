"""Predicted against measured on this machine's CPU: `python bench/planner.py [output=FILE]`.

Each case trains a widened `small` model for some steps on forked gloo ranks and measures, per rank,
the growth of its peak resident memory over what it was before the model was built, and the median
CPU time of a step. The prediction is the plan's with `machine=cpu`, whose GEMM and copy rates are
measured in the same run; workspace (imports, process groups) is outside of both. The worst rank of
each is compared, as `dry_run` prints it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NUM_STEPS = 4
RUN = [
    *("model=small", "model.hidden_size=256", "model.ffn_hidden_size=768", "optim=short"),
    *("model.moe_ffn_hidden_size=192", "model.moe_shared_expert_intermediate_size=192"),
    *("train=cpu", "train.seq_length=512", "train.micro_batch_size=1"),
    *("train.global_batch_size=2", "train.eval_interval_steps=0", "train.num_steps=100"),
    *("checkpoint.async_save=false", "machine=cpu", "machine.expert_imbalance=1.0"),
]
FULL = ["parallel.recompute_granularity=full", "parallel.recompute_method=uniform"]
CASES: dict[str, tuple[int, list[str]]] = {
    "one rank": (1, []),
    "micro batch of 2": (1, ["train.micro_batch_size=2"]),
    "full recomputation": (1, [*FULL, "parallel.recompute_num_layers=1"]),
    "MoE recomputed": (
        1,
        ["parallel.recompute_granularity=selective", "parallel.recompute_modules=[moe]"],
    ),
    "pp2": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "tp2": (2, ["parallel.tensor_model_parallel_size=2"]),
    "ep2": (2, ["parallel.expert_model_parallel_size=2"]),
    "dp2, sharded optimizer": (2, ["parallel.use_distributed_optimizer=true"]),
}


def main(words: list[str]) -> None:
    """Run every case, print the table and write it."""
    sys.path.insert(0, str(ROOT))
    given = dict(word.split("=", 1) for word in words)
    import torch

    import ring_train.runtime.distributed
    import ring_train.train.step  # noqa: F401

    torch.set_num_threads(1)
    rates = calibrate()
    results: dict[str, Any] = {"machine": machine(), "rates": rates, "cases": {}}
    calibrated = [f"machine.{name}={value:.4g}" for name, value in rates.items()]
    print(f"{'case':24}{'peak MiB':>10}{'predicted':>11}{'error':>8}"
          f"{'CPU s a step':>14}{'predicted':>11}{'error':>8}")  # fmt: skip
    output = Path(given.get("output", ROOT / "bench/results/planner.json"))
    for name, (ranks, layout) in CASES.items():
        case = compare([*RUN, *calibrated, *layout], ranks)
        results["cases"][name] = case
        print(
            f"{name:24}{case['peak_mib']:10.1f}{case['predicted_mib']:11.1f}"
            f"{case['memory_error']:8.1%}{case['step_cpu_s']:14.3f}"
            f"{case['predicted_step_s']:11.3f}{case['time_error']:8.1%}"
        )
        results["machine"]["load_after"] = os.getloadavg()[0]
        output.write_text(json.dumps(results, indent=1) + "\n")


def compare(words: list[str], num_ranks: int) -> dict[str, float]:
    """Return what a case really needs, and what the plan says."""
    from ring_train.config import compose
    from ring_train.plan import make_memory, make_plan, make_timing

    plan = make_plan(compose("pretrain", words), num_ranks)
    measured = run_ranks(words, num_ranks)
    predicted = max(rank.total - rank.parts["workspace"] for rank in make_memory(plan)) / 2**20
    peak = max(rank["peak_bytes"] for rank in measured) / 2**20
    step_s = max(rank["step_cpu_s"] for rank in measured)
    expected_s = make_timing(plan).step_s
    return {
        "peak_mib": peak,
        "predicted_mib": predicted,
        "memory_error": predicted / peak - 1,
        "step_cpu_s": step_s,
        "predicted_step_s": expected_s,
        "time_error": expected_s / step_s - 1,
    }


def run_ranks(words: Sequence[str], num_ranks: int) -> list[dict[str, float]]:
    """Return what each forked rank measures."""
    with tempfile.TemporaryDirectory() as folder:
        pids = []
        for rank in range(num_ranks):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    result = train(words, rank, num_ranks, Path(folder) / "rendezvous")
                    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
                    status = 0
                finally:
                    os._exit(status)
            pids.append(pid)
        for pid in pids:
            if os.waitpid(pid, 0)[1]:
                raise SystemExit(f"a rank failed: {' '.join(words)}")
        return [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(num_ranks)]


def train(words: Sequence[str], rank: int, num_ranks: int, store: Path) -> dict[str, float]:
    """Return peak memory over that before the model, and the CPU seconds of a step."""
    import torch.distributed as dist

    from ring_train.config import compose
    from ring_train.model.build import build_model
    from ring_train.plan import make_plan
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step
    from tests.parallel.streams import make_micro_batches

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    plan = make_plan(compose("pretrain", list(words)), num_ranks)
    with start_runtime(plan) as groups:
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        seconds = []
        for step in range(NUM_STEPS):
            rows = make_micro_batches(plan, step, groups.dp_rank)
            began = time.process_time()
            train_step(plan, model, optimizer, rows, groups.collection, step=step, num_domains=1)
            seconds.append(time.process_time() - began)
        dist.barrier()
        return {
            "peak_bytes": resident("VmHWM") - before,
            "step_cpu_s": statistics.median(seconds[1:]),
        }


def resident(field: str) -> int:
    """Return a size of this process in bytes."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(field)) * 1024


def calibrate() -> dict[str, float]:
    """Return the rates of one thread: fp32 GEMM, and a copy (read and written)."""
    import torch

    def best(action: Any) -> float:
        seconds = []
        for _ in range(7):
            began = time.process_time()
            action()
            seconds.append(time.process_time() - began)
        return min(seconds)

    n = 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    source, target = torch.randn(2**26), torch.empty(2**26)
    return {
        "gemm_tflops": 2 * n**3 / best(lambda: a @ b) / 1e12,
        "memory_gb_per_s": 2 * source.nbytes / best(lambda: target.copy_(source)) / 1e9,
    }


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "torch": importlib.metadata.version("torch"),
        "megatron-core": importlib.metadata.version("megatron-core"),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
