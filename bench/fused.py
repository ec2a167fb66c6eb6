"""Fused kernels against torch and their byte floor: `python bench/fused.py [device=cpu] ..`.

8192 tokens, 2048 channels, 16 heads of 128, 256 experts of which 8, a vocabulary of 157184, bf16:
the sizes at which linghe publishes times on an H800. Each op runs with both backends, forward and
both passes; bytes are what must be read and written once, the floor is what a large copy reaches
in the same run.

`device=cpu tokens=64` runs the torch backend alone on small sizes: a look at the code, no figure.
Prints a table, writes JSON to `output=FILE`; on a GPU fails below 0.70 of the byte floor.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
HEADS, HEAD_DIM, ROTATED, NORM_GROUPS, EPSILON = 16, 128, 64, 4, 1e-6
TOP_K, EXPERT_GROUPS, GROUP_TOP_K = 8, 8, 4
LEAST_FRACTION = 0.70


class Sizes(NamedTuple):
    """Of all ops."""

    tokens: int = 8192
    hidden: int = 2048
    experts: int = 256
    vocabulary: int = 157184


class Case(NamedTuple):
    """An op on its inputs."""

    name: str
    run: Callable[[str], Any]
    """Backend -> outputs."""
    leaves: tuple[Any, ...]
    """What gets gradients."""
    bytes: tuple[int, int]
    """Least bytes of forward and backward."""
    published_us: tuple[float, float] | None
    """linghe's forward and backward on an H800 (inclusionAI/linghe @ 02edabd, README)."""


def main(words: list[str]) -> None:
    """Measure all ops, print and write."""
    sys.path.insert(0, str(ROOT))
    given = dict(word.split("=", 1) for word in words)
    device = given.get("device", "cuda")
    tokens = int(given.get("tokens", 8192))
    sizes = Sizes() if tokens == 8192 else Sizes(tokens, 2048, 32, 512)
    output = Path(given.get("output", ROOT / f"bench/results/fused_{device}.json"))
    results = measure(sizes, device)
    output.write_text(json.dumps(results, indent=1) + "\n")
    fractions = [row["both_fraction"] for row in results["rows"] if row["backend"] == "triton"]
    if fractions and min(fractions) < LEAST_FRACTION:
        raise SystemExit(f"missed: {min(fractions):.2f} of the byte floor, least {LEAST_FRACTION}")


def measure(sizes: Sizes, device: str) -> dict[str, Any]:
    """Return rows and what they were measured on."""
    import torch

    from bench.lightning_gpu import copy_bytes_per_s, cuda_ms, version

    on_gpu = device == "cuda"
    rate = copy_bytes_per_s() if on_gpu else None
    rows = []
    for case in cases(sizes, device):
        for backend in ("triton", "torch") if on_gpu else ("torch",):
            rows.append(measure_case(case, backend, rate, cuda_ms if on_gpu else cpu_ms))
            print_row(rows[-1])
    packages = ("torch", "triton")
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {name: version(name) for name in packages},
        "copy_bytes_per_s": rate,
        "sizes": sizes._asdict(),
        "rows": rows,
    }


def measure_case(
    case: Case, backend: str, rate: float | None, time_ms: Callable[[Callable[[], Any]], float]
) -> dict[str, Any]:
    """Return times of a case, and the fraction of the byte floor where it is known."""
    import torch

    def both() -> None:
        if not case.leaves:  # the op is both passes already
            case.run(backend)
            return
        outputs = [x for x in _as_tuple(case.run(backend)) if x.is_floating_point()]
        torch.autograd.grad(outputs, case.leaves, [torch.ones_like(x) for x in outputs])

    with torch.no_grad():
        forward = time_ms(lambda: case.run(backend))
    row = {"op": case.name, "backend": backend, "forward_ms": forward, "both_ms": time_ms(both)}
    if case.published_us is not None:
        row["published_forward_us"], row["published_backward_us"] = case.published_us
    if rate is not None:
        row["forward_fraction"] = case.bytes[0] / rate / forward * 1e3
        row["both_fraction"] = sum(case.bytes) / rate / row["both_ms"] * 1e3
    return row


def cases(sizes: Sizes, device: str) -> Iterator[Case]:
    """Yield every op on random inputs."""
    import torch

    from ring_train.ops.norm import gated_group_norm, rms_norm
    from ring_train.ops.qk_norm_rope import split_qk_norm_rope
    from ring_train.ops.rope import rotary_angles
    from ring_train.ops.router import RoutingRule, router_logits, routing

    generator = torch.Generator(device).manual_seed(0)
    t, h, e = sizes.tokens, sizes.hidden, sizes.experts
    a = 2 if device == "cuda" else 4

    def draw(*shape: int, wide: bool = False) -> Any:
        x = torch.randn(shape, generator=generator, device=device)
        return (x if wide or device == "cpu" else x.bfloat16()).requires_grad_()

    qkv, norms = draw(t, HEADS, 3, HEAD_DIM), (draw(HEAD_DIM), draw(HEAD_DIM))
    cos, sin = rotary_angles(torch.arange(t, device=device), ROTATED, 1e6)
    size = a * qkv.numel()
    yield Case(
        "split, QK-norm, RoPE",
        lambda backend: split_qk_norm_rope(qkv, norms, cos, sin, eps=EPSILON, backend=backend),
        (qkv, *norms),
        (2 * size, 3 * size),
        (59.1, 107.5),
    )
    x, gate, weight = draw(t, HEADS * HEAD_DIM), draw(t, HEADS * HEAD_DIM), draw(HEADS * HEAD_DIM)
    size = a * x.numel()
    yield Case(
        "gated group norm",
        lambda backend: gated_group_norm(
            x, gate, weight, num_groups=NORM_GROUPS, eps=EPSILON, backend=backend
        ),
        (x, gate, weight),
        (3 * size, 5 * size),
        (46.9, 81.1),
    )
    hidden, norm = draw(t, h), draw(h)
    size = a * hidden.numel()
    yield Case(
        "RMSNorm",
        lambda backend: rms_norm(hidden, norm, EPSILON, backend=backend),
        (hidden, norm),
        (2 * size, 3 * size),
        None,
    )
    router, rule = draw(e, h, wide=True), RoutingRule("sigmoid", TOP_K, 8, GROUP_TOP_K, 2.5)
    bias = torch.zeros(e, device=device)
    yield Case(
        "router",
        lambda backend: routing(
            router_logits(hidden, router, backend=backend), bias, rule, backend=backend
        )[0],
        (hidden, router),
        (size + 4 * e * (h + 2 * t), 2 * size + 4 * e * (2 * h + 2 * t)),
        (61.6, 78.1),
    )
    yield from moving_cases(sizes, draw, a)


def moving_cases(sizes: Sizes, draw: Callable[..., Any], a: int) -> Iterator[Case]:
    """Yield permutation, SwiGLU and the losses of a chunk."""
    import torch

    from ring_train.ops.cross_entropy import logit_statistics, logits_to_gradient_, losses_of
    from ring_train.ops.permutation import make_permutation, permute_tokens, unpermute_tokens
    from ring_train.ops.swiglu import weighted_swiglu

    t, h, k = sizes.tokens, sizes.hidden, TOP_K
    hidden = draw(t, h)
    scores = torch.rand(t, sizes.experts, device=hidden.device)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(k).indices, True)
    permutation = make_permutation(chosen, k)
    size = a * hidden.numel()
    yield Case(
        "permute and unpermute (backend of the device)",
        lambda _: unpermute_tokens(permute_tokens(hidden, permutation), permutation),
        (hidden,),
        (2 * (1 + k) * size, 2 * (1 + k) * size),
        None,
    )
    inner, weights = draw(t * k, 2 * h // 4), draw(t * k, wide=True)
    size = a * inner.numel()
    yield Case(
        "weighted SwiGLU",
        lambda backend: weighted_swiglu(inner, weights, backend=backend),
        (inner, weights),
        (3 * size // 2, 5 * size // 2),
        None,
    )
    logits = draw(min(t, 1024), sizes.vocabulary)
    labels = torch.zeros(len(logits), dtype=torch.int64, device=hidden.device)
    size = a * logits.numel()

    def gradient(backend: str) -> Any:
        held = logits.detach()
        _, log_sum_exp = losses_of(logit_statistics(held, labels, backend=backend))
        given = torch.ones_like(log_sum_exp)
        return logits_to_gradient_(held, labels, log_sum_exp, given, backend=backend)

    yield Case("loss and gradient of 1024 tokens", gradient, (), (3 * size, 0), None)


def cpu_ms(function: Callable[[], Any]) -> float:
    """Return the median CPU time of a few calls."""
    times = []
    for _ in range(3):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return 1e3 * statistics.median(times)


def print_row(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    fraction = f"{row['both_fraction']:6.2f} of the byte floor" if "both_fraction" in row else ""
    print(
        f"{row['op']:46}{row['backend']:8}forward {row['forward_ms']:9.3f} ms"
        f"   both {row['both_ms']:9.3f} ms  {fraction}",
        flush=True,
    )


def _as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


if __name__ == "__main__":
    main(sys.argv[1:])
