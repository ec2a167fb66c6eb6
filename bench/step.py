"""Steps of real-size layers on one GPU: `python bench/step.py [model=NAME] [KEY=VALUE ..]`.

A slice of a preset (`model=ring_mini_linear_2_0`, or `ring_flash_linear_2_0`): `layers=5` of its
layers with `experts=32` of its experts, bf16, through the real plan, model, optimizer and
`train_step`, rows of `tokens=4096,32768`. Each of the kernels `torch`, `triton` and `fla` of
lightning attention, with routing as it comes and forced to be even. Reports tokens/s, MFU against
989 TFLOP/s and against the matrix product measured in the same run, and the peak of allocated
memory beside what the plan predicts without workspace and slack.

On a CPU (`model=tiny tokens=32 steps=1`) it runs in fp32 without rates: a look at the code. Prints
a table, writes JSON to `output=FILE`. Other words are overrides of the run.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PEAK_TFLOPS = 989.0
"""Dense bf16 of an H100 or H200 SXM."""
OWN_WORDS = ("model", "layers", "experts", "tokens", "steps", "output")


def main(words: list[str]) -> None:
    """Measure all kernels, lengths and routings, print and write."""
    sys.path.insert(0, str(ROOT))
    given = dict(word.split("=", 1) for word in words)
    overrides = [word for word in words if word.split("=", 1)[0] not in OWN_WORDS]
    output = Path(given.get("output", ROOT / "bench/results/step.json"))
    results = measure(given, overrides)
    output.write_text(json.dumps(results, indent=1) + "\n")


def measure(given: dict[str, str], overrides: list[str]) -> dict[str, Any]:
    """Return rows and what they were measured on."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    kernels = ("triton", "torch", "fla") if on_gpu else ("torch",)
    lengths = [int(n) for n in given.get("tokens", "4096,32768").split(",")]
    steps = int(given.get("steps", 10))
    product_tflops = gemm_tflops() if on_gpu else None
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        import ring_train.runtime.distributed  # noqa: F401  (before the first group)

        store = f"file://{folder}/store"
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
        for tokens in lengths:
            for kernel in kernels:
                for even in (False, True):
                    words = [*run_words(given, tokens, kernel, on_gpu), *overrides]
                    row = {"tokens": tokens, "lightning": kernel, "even_routing": even}
                    rows.append(row | measure_run(words, steps, even, product_tflops))
                    print_row(rows[-1])
        dist.destroy_process_group()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {"torch": torch.__version__},
        "product_tflops": product_tflops,
        "rows": rows,
    }


def run_words(given: dict[str, str], tokens: int, kernel: str, on_gpu: bool) -> list[str]:
    """Return the overrides of a run."""
    model = given.get("model", "ring_mini_linear_2_0")
    words = [
        *(f"model={model}", "optim=short", "train=cpu", f"train.seq_length={tokens}"),
        *("train.micro_batch_size=1", "train.global_batch_size=1", "train.num_steps=1000"),
        *("train.eval_interval_steps=0", "model.mtp_num_layers=0", "checkpoint.async_save=false"),
        f"kernels.lightning={kernel}",
        f"train.precision={'bf16' if on_gpu else 'fp32'}",
    ]
    if model.startswith("ring_"):
        words += [
            f"model.num_layers={given.get('layers', '5')}",
            f"model.num_moe_experts={given.get('experts', '32')}",
        ]
    return words


def measure_run(
    words: list[str], steps: int, even: bool, product_tflops: float | None
) -> dict[str, Any]:
    """Return the median step of a run, its rates and its peak of memory."""
    import torch

    import ring_train.runtime.distributed
    from ring_train.config import compose
    from ring_train.data.batch import pack_documents
    from ring_train.model.build import build_model
    from ring_train.plan import make_memory, make_plan
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step

    plan = make_plan(compose("pretrain", words), 1)
    length = plan.batch.seq_length
    with ring_train.runtime.distributed.start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        if even:
            force_even_routing(model)
        optimizer = build_optimizer(plan, model, groups.collection)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, plan.config.model.vocab_size, (length,), generator=generator)
        rows = [pack_documents([ids.tolist()], num_mtp=0).to(groups.device)]
        on_gpu = torch.cuda.is_available()
        times = []
        for number in range(steps + 2):
            if on_gpu and number == 2:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            train_step(plan, model, optimizer, rows, groups.collection, step=20, num_domains=1)
            torch.cuda.synchronize()
            if number > 1:  # the first steps compile and allocate
                times.append(time.perf_counter() - began)
        parts = make_memory(plan)[0].parts
        peak = torch.cuda.max_memory_allocated() if on_gpu else None
    predicted = sum(size for name, size in parts.items() if name not in ("workspace", "slack"))
    step_s = statistics.median(times)
    found = {"step_s": step_s, "peak_bytes": peak, "predicted_bytes": predicted}
    if product_tflops is not None:
        tflops = plan.flops_per_token(plan.phases[0]) * length / step_s / 1e12
        found |= {
            "tokens_per_s": length / step_s,
            "mfu": tflops / PEAK_TFLOPS,
            "fraction_of_product": tflops / product_tflops,
        }
    return found


def force_even_routing(model: Any) -> None:
    """Send every expert as many tokens as any other, with equal weights."""
    import torch

    from ring_train.model.router import routers

    def evenly(topk: int, scale: float) -> Callable[[Any], Any]:
        def routing(logits: Any) -> Any:
            tokens, experts = logits.shape
            first = torch.arange(tokens, device=logits.device)[:, None] * topk
            places = (first + torch.arange(topk, device=logits.device)) % experts
            chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, places, True)
            # Zero times the logits keeps the router in the graph.
            return chosen * (scale / topk + 0.0 * logits), chosen

        return routing

    for router in routers(model):
        node: Any = router
        scale = node.model.moe_router_topk_scaling_factor
        node.routing = evenly(node.model.moe_router_topk, scale)


def gemm_tflops() -> float:
    """Return the rate of a product of two 8192 x 8192 matrices in bf16, random values."""
    import torch
    from triton.testing import do_bench

    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / float(do_bench(lambda: a @ b, return_mode="median")) / 1e9


def print_row(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    rates = ""
    if "mfu" in row:
        rates = (
            f"{row['tokens_per_s']:10.0f} tokens/s  MFU {row['mfu']:.3f}"
            f"  peak {row['peak_bytes'] / 2**30:.1f} GiB"
            f" (plan {row['predicted_bytes'] / 2**30:.1f})"
        )
    routing = "even" if row["even_routing"] else "natural"
    print(
        f"{row['tokens']:7} {row['lightning']:8}{routing:9}{row['step_s']:9.3f} s{rates}",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
