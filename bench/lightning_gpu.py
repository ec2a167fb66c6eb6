"""The GPU part of bench/lightning.py."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import roofline
from bench.lightning import both_passes, draw, errors, gate, make_inputs, ours, softmax

HEAD_DIM, ELEMENT_BYTES = 128, 2
SHAPES = tuple(
    (rows, heads, 1024 * k)
    for rows, heads in ((1, 16), (1, 32), (2, 32), (4, 16))
    for k in (4, 8, 16, 32, 64, 128)
    if rows == 1 or k in (4, 32)
)
"""(rows, heads, tokens of a row)."""
TORCH_TOKENS = 32768
"""Most tokens, rows together, that our torch backend is given."""
LEAST_FORWARD, LEAST_BOTH = 1.2, 1.5
"""Of fla's time over ours."""
LEAST_FRACTION, LARGE = 0.40, 512 * 1024
"""Fraction of the byte roofline of both passes, from so many rows x heads x tokens."""
LEAST_PACKED = 0.85
"""Speed of packed documents over that of one row of as many tokens."""
MEDIAN_DOCUMENT, SPREAD = 1000, 1.2
"""Lengths of packed documents: exp(normal(log(median), spread)) tokens."""
BF16_ERROR = 1e-2
"""Of the largest value: inputs of products, states and results are rounded to 2^-9 each."""


def measure_gpu() -> dict[str, Any]:
    """Return rows, gates and what they were measured on."""
    import torch

    names = ["triton", "torch", "flash"]
    if importlib.util.find_spec("fla") is not None:
        names.append("fla")
    copy = copy_bytes_per_s()
    print(f"{torch.cuda.get_device_name()}: copies {copy / 1e12:.2f} TB/s")
    accuracy = gpu_errors([name for name in names if name != "flash"])
    rows = []
    for shape in SHAPES:
        rows += gpu_rows(shape, names, copy, cuda_ms)
        torch.cuda.empty_cache()
    packages = ("torch", "triton", "flash-linear-attention")
    return {
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in packages},
        "copy_bytes_per_s": copy,
        "shape": {"head_dim": HEAD_DIM, "dtype": "bfloat16"},
        "errors": accuracy,
        "rows": rows,
        "gates": gpu_gates(rows, accuracy),
    }


def version(name: str) -> str | None:
    """Return the version of a package, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def copy_bytes_per_s() -> float:
    """Return what a copy of 4 GiB reads and writes in a second: the byte roofline."""
    import torch

    source = torch.empty(2**31, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (cuda_ms(lambda: target.copy_(source)) / 1e3)


def cuda_ms(function: Callable[[], Any]) -> float:
    """Return the median time of a function with a cold L2 cache, after warming up."""
    from triton.testing import do_bench

    return float(do_bench(function, warmup=50, rep=200, return_mode="median"))


def gpu_errors(names: Sequence[str], device: str = "cuda") -> dict[str, dict[str, float]]:
    """Return errors of bf16 results against our torch backend in fp64 on the same inputs."""
    import torch

    lengths = (1500, 37, 2559)
    inputs = make_inputs(lengths, 4, HEAD_DIM, torch.bfloat16, device)
    wide = [x.detach().double().requires_grad_() for x in inputs[:4]]
    wide_inputs = inputs._replace(q=wide[0], k=wide[1], v=wide[2], grad=wide[3].detach())
    expected = both_passes(ours(wide_inputs, "torch"), wide_inputs)()
    found = {name: both_passes(ours(inputs, name), inputs)() for name in names}
    return {name: errors(results, expected) for name, results in found.items()}


def gpu_rows(
    shape: tuple[int, int, int],
    names: Sequence[str],
    copy_rate: float,
    time_ms: Callable[[Callable[[], Any]], float],
    device: str = "cuda",
) -> list[dict[str, Any]]:
    """Return and print a row for each implementation of a shape, and for packed documents."""
    import torch

    rows, heads, num_tokens = shape
    equal = make_inputs((num_tokens,) * rows, heads, HEAD_DIM, torch.bfloat16, device)
    found = []
    for name in [*names, "triton, packed", "fla, packed"]:
        backend = name.removesuffix(", packed")
        if backend not in names or (name == "torch" and rows * num_tokens > TORCH_TOKENS):
            continue
        inputs = equal
        if backend != name:
            inputs = equal._replace(lengths=document_lengths(rows * num_tokens))
        forward = None
        if name == "flash":
            forward, inputs = softmax(inputs)
        forward = forward or ours(inputs, backend)
        with torch.no_grad():
            forward_ms = time_ms(forward)
        both_ms = time_ms(both_passes(forward, inputs))
        found.append({"name": name, "rows": rows, "heads": heads, "tokens": num_tokens})
        found[-1] |= rates(shape, forward_ms, both_ms, copy_rate)
        print_row(found[-1])
    return found


def document_lengths(num_tokens: int) -> tuple[int, ...]:
    """Return lognormal lengths of documents, together `num_tokens`, the same in every run."""
    import torch

    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := num_tokens - sum(lengths)) > 0:
        drawn = MEDIAN_DOCUMENT * torch.exp(SPREAD * torch.randn((), generator=generator))
        lengths.append(min(left, max(1, int(drawn))))
    return tuple(lengths)


def rates(
    shape: tuple[int, int, int], forward_ms: float, both_ms: float, copy_rate: float
) -> dict[str, float]:
    """Return times, and the rates of lightning attention's own FLOPs and least bytes."""
    rows, heads, num_tokens = shape
    forward = rows * heads * roofline.forward_flops(num_tokens, HEAD_DIM)
    backward = rows * heads * roofline.backward_flops(num_tokens, HEAD_DIM)
    least = [
        rows * heads * roofline.ideal_bytes(num_tokens, HEAD_DIM, ELEMENT_BYTES, backward=backward)
        for backward in (False, True)
    ]
    return {
        "forward_ms": forward_ms,
        "both_ms": both_ms,
        "forward_tflops": forward / forward_ms / 1e9,
        "both_tflops": (forward + backward) / both_ms / 1e9,
        "forward_gb_per_s": least[0] / forward_ms / 1e6,
        "both_gb_per_s": least[1] / both_ms / 1e6,
        "forward_roofline_fraction": least[0] / forward_ms * 1e3 / copy_rate,
        "both_roofline_fraction": least[1] / both_ms * 1e3 / copy_rate,
    }


def print_row(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    print(
        f"{row['rows']},{row['heads']},{row['tokens'] // 1024}K".ljust(12)
        + f"{row['name']:16}forward {row['forward_ms']:9.3f} ms {row['forward_gb_per_s']:7.0f} GB/s"
        f"   both {row['both_ms']:9.3f} ms {row['both_tflops']:7.1f} TFLOP/s"
        f" {row['both_gb_per_s']:7.0f} GB/s {row['both_roofline_fraction']:6.2f} of the roofline",
        flush=True,
    )


def gpu_gates(
    rows: Sequence[dict[str, Any]], accuracy: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """Return the worst of each goal over all shapes; without fla those against it are missing."""
    by_key = {(r["name"], r["rows"], r["heads"], r["tokens"]): r for r in rows}
    own = [r for r in rows if r["name"] == "triton"]
    gates = [
        gate("largest error in bf16", max(accuracy["triton"].values()), BF16_ERROR, least=False)
    ]
    for field, bound in (("forward_ms", LEAST_FORWARD), ("both_ms", LEAST_BOTH)):
        ratios = [
            other[field] / row[field]
            for row in own
            if (other := by_key.get(("fla", row["rows"], row["heads"], row["tokens"])))
        ]
        if ratios:
            gates.append(gate(f"fla over ours, {field}", min(ratios), bound, least=True))
    large = [
        row["both_roofline_fraction"]
        for row in own
        if row["rows"] * row["heads"] * row["tokens"] >= LARGE
    ]
    if large:
        gates.append(gate("fraction of the byte roofline", min(large), LEAST_FRACTION, least=True))
    packed = [
        row["both_ms"]
        / by_key["triton, packed", row["rows"], row["heads"], row["tokens"]]["both_ms"]
        for row in own
    ]
    return [*gates, gate("packed over one row, speed", min(packed), LEAST_PACKED, least=True)]


def plot_gpu(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the time of both passes over tokens for one row of 32 heads."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if (row["rows"], row["heads"]) == (1, 32):
            curves.setdefault(row["name"], []).append((row["tokens"], row["both_ms"]))
    draw(curves, path, "ms, forward and backward, 32 heads of 128, bf16")
