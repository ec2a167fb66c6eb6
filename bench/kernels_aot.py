"""What the compiler makes of every Triton kernel, without a GPU: `python bench/kernels_aot.py`.

Words: `families=NAME,.. targets=sm_90,.. case=NAME kernels=NAME,.. output=FILE` narrow it.

Launch functions run on tensors of the device "meta" (bench/kernels_launches.py) and their launches
are caught, so each kernel is compiled with the arguments, block sizes and candidates (warps,
stages) that a real launch has. A row of the table is a kernel, a candidate and a target: registers
a thread, bytes of stack and local memory a thread (where spilled registers go), shared memory, how
many programs fit on a multiprocessor at a time, instructions of tensor cores, seconds of
compilation. Fails if no candidate of a kernel fits the shared memory of a target. It shows that
kernels compile, not that they are right: that is the interpreter's part (tests/unit/ops).
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WARP = 32


@dataclass(frozen=True)
class Target:
    """Limits of a compute capability (CUDA C++ Programming Guide, technical specifications)."""

    capability: int
    shared_bytes: int
    """Of a program at most."""
    shared_bytes_per_multiprocessor: int
    registers_per_multiprocessor: int = 65536
    warps_per_multiprocessor: int = 64
    programs_per_multiprocessor: int = 32


TARGETS = {
    "sm_90": Target(90, 227 * 1024, 228 * 1024),
    "sm_80": Target(80, 163 * 1024, 164 * 1024),
}
RESERVED_BYTES = 1024
"""Shared memory that the driver takes for each program."""


@dataclass(frozen=True)
class Launch:
    """A launch that was caught."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One kernel, compiled."""

    family: str
    case: str
    kernel: str
    flags: str
    """Its constants that are true, e.g. REVERSE."""
    target: str
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    """Stack and local memory of a thread."""
    shared_bytes: int
    programs_per_multiprocessor: int
    """0: does not fit."""
    wgmma: int
    mma: int
    compile_s: float


def main(words: list[str]) -> None:
    """Compile what the words ask for, print the table and write it."""
    given = dict(word.split("=", 1) for word in words)
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # seconds of compilation, not of a cache
    sys.path.insert(0, str(ROOT))
    from bench.kernels_launches import FAMILIES

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for family in given.get("families", ",".join(FAMILIES)).split(","):
            for target in given.get("targets", ",".join(TARGETS)).split(","):
                for case, function in FAMILIES[family](TARGETS[target].capability).items():
                    if given.get("case", case) == case:
                        chosen = given.get("kernels")
                        rows += compile_case((family, case, target), function, chosen)
    output = Path(given.get("output", ROOT / "bench/results/kernels_aot.json"))
    names = ("torch", "triton")
    versions = {name: importlib.metadata.version(name) for name in names}
    listed = ",\n  ".join(json.dumps(asdict(row)) for row in rows)  # a row a line
    output.write_text(f'{{"versions": {json.dumps(versions)},\n "rows": [\n  {listed}]}}\n')
    if missing := without_fit(rows):
        raise SystemExit(f"no candidate fits the shared memory of its target: {missing}")


def compile_case(
    labels: tuple[str, str, str], function: Callable[[], Any], chosen: str | None
) -> list[Row]:
    """Return a row for every different launch of a function and every candidate; print them."""
    rows, seen = [], set()
    for launch in record(function):
        name = launch.kernel.__name__.strip("_")
        source, options = specialize(launch)
        key = (name, str(source.signature), str(source.constants), str(source.attrs), str(options))
        if key in seen or (chosen is not None and name not in chosen.split(",")):
            continue
        seen.add(key)
        rows.append(compile_one(labels, name, source, options))
        print_row(rows[-1], first=len(rows) == 1)
    return rows


def without_fit(rows: list[Row]) -> list[str]:
    """Return the kernels of which no candidate fits, as 'target family case kernel flags'."""
    fits: dict[str, bool] = {}
    for row in rows:
        key = f"{row.target} {row.family} {row.case} {row.kernel} {row.flags}"
        fits[key] = fits.get(key, False) or row.programs_per_multiprocessor > 0
    return [key for key, fit in fits.items() if not fit]


@contextmanager
def caught(launches: list[Launch]) -> Iterator[None]:
    """Append launches of Triton kernels to a list in place of running them."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    def run_jit(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(self, args, options))

    def run_autotuner(self: Any, *args: Any, **options: Any) -> None:
        for config in self.configs:
            self.fn.run(*args, **options, **config.all_kwargs())

    kept: tuple[Any, Any] = JITFunction.run, Autotuner.run
    JITFunction.run, Autotuner.run = run_jit, run_autotuner
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run = kept


def record(function: Callable[[], Any]) -> list[Launch]:
    """Return the launches of a function, every candidate of a tuned kernel one of its own."""
    launches: list[Launch] = []
    with caught(launches):
        function()
    return launches


def specialize(launch: Launch) -> tuple[Any, dict[str, int]]:
    """Return the source that Triton would compile for a launch, and the compiler's options.

    As in Triton's own dispatch: an argument that is None or 1 is a constant; pointers (aligned by
    torch's allocator) and multiples of 16 are marked so.
    """
    import torch
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    kernel = launch.kernel
    parameters = {p.name: p for p in kernel.params}
    options = {k: v for k, v in launch.options.items() if k not in parameters}
    named = {k: v for k, v in launch.options.items() if k in parameters}
    bound = inspect.signature(kernel.fn).bind(*launch.args, **named)
    bound.apply_defaults()
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for index, (name, value) in enumerate(bound.arguments.items()):
        whole = isinstance(value, int) and not isinstance(value, bool)
        specialized = not parameters[name].do_not_specialize
        if parameters[name].is_constexpr or value is None or (whole and value == 1 and specialized):
            signature[name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[name] = mangle_type(value)
        if isinstance(value, torch.Tensor) or (whole and value % 16 == 0 and specialized):
            attrs[(index,)] = aligned
    return ASTSource(kernel, signature, constants, attrs), options


def compile_one(
    labels: tuple[str, str, str], name: str, source: Any, options: dict[str, int]
) -> Row:
    """Return what the compiler makes of a source."""
    import triton
    from triton.backends.compiler import GPUTarget

    family, case, target = labels
    limits = TARGETS[target]
    began = time.perf_counter()
    compiled = triton.compile(
        source, target=GPUTarget("cuda", limits.capability, WARP), options=options
    )
    seconds = time.perf_counter() - began
    flags = [source.fn.arg_names[i] for (i,), value in source.constants.items() if value is True]
    registers, spills = resources(compiled.asm["cubin"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return Row(
        *(family, case, name, " ".join(flags), target, warps, compiled.metadata.num_stages),
        registers=registers,
        spill_bytes=spills,
        shared_bytes=shared,
        programs_per_multiprocessor=occupancy(limits, warps, registers, shared),
        wgmma=compiled.asm["ptx"].count("wgmma.mma_async"),
        mma=compiled.asm["ptx"].count("mma.sync"),
        compile_s=round(seconds, 2),
    )


def resources(cubin: bytes) -> tuple[int, int]:
    """Return registers, and bytes of stack and local memory, of a thread."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise SystemExit(f"cuobjdump names no resources: {text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def occupancy(limits: Target, num_warps: int, registers: int, shared_bytes: int) -> int:
    """Return how many programs fit on a multiprocessor; 0 if one alone asks for too much.

    Registers are given out to warps in units of 256.
    """
    if shared_bytes > limits.shared_bytes:
        return 0
    of_warp = -(-registers * WARP // 256) * 256
    return min(
        limits.programs_per_multiprocessor,
        limits.warps_per_multiprocessor // num_warps,
        limits.registers_per_multiprocessor // (of_warp * num_warps),
        limits.shared_bytes_per_multiprocessor // (shared_bytes + RESERVED_BYTES),
    )


def print_row(row: Row, *, first: bool) -> None:
    """Print a row, before the first one of a case its heading."""
    if first:
        print(f"\n{row.family}, {row.case}, {row.target}")
        print(
            f"{'kernel':18}{'warps':>6}{'stages':>7}{'registers':>10}{'spill B':>8}"
            f"{'shared KiB':>11}{'programs':>9}{'wgmma':>6}{'mma':>5}{'compile s':>10}  flags"
        )
    print(
        f"{row.kernel:18}{row.num_warps:6}{row.num_stages:7}{row.registers:10}{row.spill_bytes:8}"
        f"{row.shared_bytes / 1024:11.1f}{row.programs_per_multiprocessor:9}{row.wgmma:6}"
        f"{row.mma:5}{row.compile_s:10.2f}  {row.flags}",
        flush=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
