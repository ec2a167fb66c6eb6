"""Lightning attention against others: `python bench/lightning.py [device=cuda] [output=FILE]`.

On a CPU: one thread, fp32, one row, 4 heads of 64 channels; our torch backend, causal softmax
attention (torch's SDPA) and the products of all pairs (naive), forward and backward. Medians of CPU
time of rounds in which all take turns. Errors are against fp64. The process keeps the memory that
it has had, as a training process does; with `memory=default` glibc returns it after each pass, and
half of our time goes into page faults.

On a GPU: bf16, heads of 128 channels; our Triton and torch backends, flash-linear-attention
(`chunk_simple_gla` with a constant decay, if installed) and flash attention, rows of equal length
and packed documents of lognormal length. Rates count the FLOPs and bytes of bench/roofline.py for
everyone; the roofline is what a large copy reaches in the same run.

Prints a table and what was missed, writes JSON and a plot beside it; fails if a gate was missed.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

CPU_TOKENS = (1024, 4096, 16384)
CPU_HEADS, CPU_HEAD_DIM = 4, 64
NAIVE_TOKENS = 4096
"""Longest row of the naive product, whose pairs else exceed the memory of a small machine."""
ROUNDS = {1024: 15, 4096: 9, 16384: 5}
CPU_ERROR = 1e-5
LEAST_SPEEDUP = {4096: 6.0, 16384: 25.0}
"""Of our op over SDPA, by length."""
MOST_GROWTH = 1.15
"""Of our time a token from 4096 to 16384 tokens."""
NAMES = ("o", "dq", "dk", "dv")


class Inputs(NamedTuple):
    """Leaves [t, n, d], the gradient of the output, decay rates, lengths of documents."""

    q: Any
    k: Any
    v: Any
    grad: Any
    slopes: Any
    lengths: tuple[int, ...]


def main(words: list[str]) -> None:
    """Measure on a device, print and write."""
    sys.path.insert(0, str(ROOT))
    given = dict(word.split("=", 1) for word in words)
    device = given.get("device", "cpu")
    output = Path(given.get("output", ROOT / f"bench/results/lightning_{device}.json"))
    if device == "cuda":
        from bench.lightning_gpu import measure_gpu, plot_gpu

        results = measure_gpu()
        plot_gpu(results["rows"], output.with_suffix(".png"))
    else:
        kept = given.get("memory", "kept") == "kept"
        if kept:
            keep_memory()
        results = {"memory": "kept" if kept else "default", **measure_cpu()}
        plot_cpu(results["rows"], output.with_suffix(".png"))
    output.write_text(json.dumps(results, indent=1) + "\n")
    print_gates(results["gates"])
    if missed := [gate["gate"] for gate in results["gates"] if not gate["met"]]:
        raise SystemExit(f"missed: {missed}")


def keep_memory() -> None:
    """Let glibc's malloc take memory from the heap only, and return none of it to the system."""
    trim_threshold, mmap_max = -1, -4  # malloc.h
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(trim_threshold, 2**31 - 1) and libc.mallopt(mmap_max, 0)):
        raise SystemExit("this libc has no mallopt; pass memory=default")


def gate(name: str, value: float, bound: float, *, least: bool) -> dict[str, Any]:
    """Return a gate with its outcome; `least`: the value must reach the bound."""
    met = value >= bound if least else value <= bound
    return {"gate": name, "value": value, "bound": bound, "least": least, "met": met}


def print_gates(gates: Iterable[dict[str, Any]]) -> None:
    """Print each gate with its value and outcome."""
    for item in gates:
        sign = ">=" if item["least"] else "<="
        state = "met" if item["met"] else "MISSED"
        print(f"{item['gate']:48}{item['value']:10.3g} {sign} {item['bound']:<8.3g} {state}")


def make_inputs(
    lengths: tuple[int, ...], heads: int, head_dim: int, dtype: Any, device: str = "cpu"
) -> Inputs:
    """Return random inputs of a packed row, decays of the middle layer of a deep model."""
    import torch

    from ring_train.ops.decay import decay_slopes

    generator = torch.Generator().manual_seed(0)
    shape = (sum(lengths), heads, head_dim)
    values = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]
    for leaf in values[:3]:
        leaf.requires_grad_()
    slopes = decay_slopes(heads, 14, 28, "zero_based").to(device)
    return Inputs(*values, slopes=slopes, lengths=lengths)


def ours(inputs: Inputs, backend: str) -> Callable[[], Any]:
    """Return the forward pass of a backend."""
    import torch

    from ring_train.ops.lightning import lightning_attention

    q, k, v, _, slopes, lengths = inputs
    boundaries = torch.tensor([0, *lengths], device=q.device).cumsum(0)
    return lambda: lightning_attention(
        *(q, k, v, slopes), cu_seqlens=boundaries, lengths=lengths, backend=backend
    )[0]


def softmax(inputs: Inputs) -> tuple[Callable[[], Any], Inputs]:
    """Return causal softmax attention of rows of equal length, and leaves as it likes them."""
    import torch

    q, k, v, grad, slopes, lengths = inputs
    rows = (len(lengths), lengths[0])
    leaves = [
        x.detach().unflatten(0, rows).transpose(1, 2).contiguous() for x in (q, k, v, grad)
    ]  # [b, n, s, d]
    for leaf in leaves[:3]:
        leaf.requires_grad_()
    attend = torch.nn.functional.scaled_dot_product_attention
    own = Inputs(*leaves, slopes=slopes, lengths=lengths)
    return (lambda: attend(own.q, own.k, own.v, is_causal=True)), own


def naive(inputs: Inputs) -> Callable[[], Any]:
    """Return the forward pass of one document as products of all pairs; weights made before."""
    import torch

    q, k, v, _, slopes, (length,) = inputs
    place = torch.arange(length, device=q.device)
    distance = (place[:, None] - place[None, :]).double()
    scale = q.shape[2] ** -0.5
    decay = torch.exp(-slopes.double()[:, None, None] * distance.clamp(min=0)) * (distance >= 0)
    weights = (scale * decay).to(q.dtype)
    return lambda: (
        (weights * (q.transpose(0, 1) @ k.permute(1, 2, 0))) @ v.transpose(0, 1)
    ).transpose(0, 1)


def both_passes(forward: Callable[[], Any], inputs: Inputs) -> Callable[[], Any]:
    """Return a function of output and gradients of q, k, v."""
    import torch

    def run() -> tuple[Any, ...]:
        output = forward()
        return output, *torch.autograd.grad(output, (inputs.q, inputs.k, inputs.v), inputs.grad)

    return run


def exact(inputs: Inputs, block: int = 512) -> list[Any]:
    """Return output and gradients of one document in fp64: pairs of all tokens, by rows."""
    import torch

    q, k, v, grad = (x.detach().double().transpose(0, 1) for x in inputs[:4])  # [n, t, d]
    output, dq, dk, dv = (torch.zeros_like(x) for x in (v, q, k, v))
    scale = q.shape[2] ** -0.5
    for head, slope in enumerate(inputs.slopes.double()):
        for start in range(0, q.shape[1], block):
            rows = slice(start, min(start + block, q.shape[1]))
            seen = slice(0, rows.stop)
            place = torch.arange(rows.stop, dtype=torch.float64, device=q.device)
            distance = place[rows, None] - place[None, :]
            weights = scale * torch.exp(-slope * distance.clamp(min=0)) * (distance >= 0)
            scores = weights * (q[head, rows] @ k[head, seen].T)
            output[head, rows] = scores @ v[head, seen]
            dv[head, seen] += scores.T @ grad[head, rows]
            scores_grad = weights * (grad[head, rows] @ v[head, seen].T)
            dq[head, rows] = scores_grad @ k[head, seen]
            dk[head, seen] += scores_grad.T @ q[head, rows]
    return [x.transpose(0, 1) for x in (output, dq, dk, dv)]


def errors(found: Iterable[Any], expected: Iterable[Any]) -> dict[str, float]:
    """Return the largest difference of each result over its largest value."""
    return {
        name: float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max())
        for name, a, b in zip(NAMES, found, expected, strict=True)
    }


def measure_cpu() -> dict[str, Any]:
    """Return rows, gates and what they were measured on."""
    import torch

    torch.set_num_threads(1)
    described = machine()
    print(f"{'tokens':>7}{'ours us':>9}{'SDPA us':>9}{'naive us':>10}{'SDPA/ours':>11}  errors")
    rows = [cpu_row(num_tokens) for num_tokens in CPU_TOKENS]
    described["load_after"] = os.getloadavg()[0]
    by_length = {row["tokens"]: row for row in rows}
    gates = [
        gate(f"speedup over SDPA at {n}", by_length[n]["speedup_over_sdpa"], bound, least=True)
        for n, bound in LEAST_SPEEDUP.items()
    ]
    growth = by_length[16384]["us_per_token"]["ours"] / by_length[4096]["us_per_token"]["ours"]
    gates.append(gate("time a token, 16384 over 4096", growth, MOST_GROWTH, least=False))
    worst = max(value for row in rows for value in row["errors"].values())
    gates.append(gate("largest error against fp64", worst, CPU_ERROR, least=False))
    shape = {"heads": CPU_HEADS, "head_dim": CPU_HEAD_DIM, "dtype": "float32", "threads": 1}
    return {"machine": described, "shape": shape, "rows": rows, "gates": gates}


def cpu_row(num_tokens: int) -> dict[str, Any]:
    """Return microseconds a token, forward and backward, of every implementation at a length."""
    import torch

    inputs = make_inputs((num_tokens,), CPU_HEADS, CPU_HEAD_DIM, torch.float32)
    run_ours = both_passes(ours(inputs, "torch"), inputs)
    runs = {"ours": run_ours, "sdpa": both_passes(*softmax(inputs))}
    found = errors(run_ours(), exact(inputs))
    if num_tokens <= NAIVE_TOKENS:
        runs["naive"] = both_passes(naive(inputs), inputs)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS[num_tokens] + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - began)
    per_token = {
        name: 1e6 * statistics.median(values) / num_tokens for name, values in seconds.items()
    }
    speedup = per_token["sdpa"] / per_token["ours"]
    print(
        f"{num_tokens:7}{per_token['ours']:9.1f}{per_token['sdpa']:9.1f}"
        f"{per_token.get('naive', math.nan):10.1f}{speedup:11.1f}  "
        + " ".join(f"{name} {value:.1e}" for name, value in found.items()),
        flush=True,
    )
    return {
        "tokens": num_tokens,
        "us_per_token": per_token,
        "speedup_over_sdpa": speedup,
        "errors": found,
    }


def plot_cpu(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw microseconds a token over tokens."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row["us_per_token"].items():
            curves.setdefault(name, []).append((row["tokens"], value))
    draw(curves, path, "us a token, forward and backward, one CPU thread")


def draw(curves: dict[str, list[tuple[float, float]]], path: Path, label: str) -> None:
    """Draw curves over tokens of a row, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a row", ylabel=label)
    axes.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")


def machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "torch": importlib.metadata.version("torch"),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
