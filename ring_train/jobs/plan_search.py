"""Find the fastest layout: `python -m ring_train.jobs.plan_search world_size=N model=M machine=X`.

Prints the best layouts as a table and the words of the first as a command line. Starts no process
group and imports neither torch nor megatron. Exits 2 if no layout is legal, or none fits.
"""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

from ring_train.config import PlanSearchConfig, compose
from ring_train.errors import UserError
from ring_train.jobs.run_length import with_num_steps
from ring_train.plan import Found, Layout, search

USER_ERROR_STATUS = 2
GIB = 2**30
OWN_KEYS = ("world_size=", "best=", "json=")
COLUMNS = ("tp", "pp", "vpp", "ep", "etp", "cp", "dp")


def main(words: list[str]) -> int:
    """Search with the given words; return the exit status."""
    try:
        config: PlanSearchConfig = compose("plan_search", words)
        _check(config)
        found = search(with_num_steps(config), config.world_size, config.best)
        if not found.layouts:
            raise UserError(_nothing_fits(config, found))
        if config.json is not None:
            _write(found, config.json)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return USER_ERROR_STATUS
    sys.stdout.write(_table(found.layouts))
    count = f"{found.num_fitting:,} of {found.num_legal:,} legal layouts fit"
    sys.stdout.write(f"\n{count}. Times are estimates, see docs/planner.md. The first is:\n\n")
    given = [word for word in words if not word.startswith(OWN_KEYS)]
    command = ["python", "-m", "ring_train.jobs.dry_run", f"world_size={config.world_size}"]
    sys.stdout.write(f"    {shlex.join([*command, *given, *found.layouts[0].overrides])}\n")
    return 0


def _check(config: PlanSearchConfig) -> None:
    """Refuse what cannot be searched with."""
    if config.machine.name is None:
        raise UserError("machine=none: a search needs rates and memory; choose e.g. machine=h100")
    if config.best < 1:
        raise UserError(f"best={config.best} prints no layout; choose 1 or more")
    if config.parallel.pipeline_layers is not None:
        raise UserError(
            f"parallel.pipeline_layers={config.parallel.pipeline_layers} fits one pipeline only, "
            "and the search tries many; leave it at null"
        )


def _nothing_fits(config: PlanSearchConfig, found: Found) -> str:
    """Return what the smallest layout lacks."""
    assert found.closest is not None
    plan, rank = found.closest
    lacks = rank.total / GIB - config.machine.memory_gib
    mesh = ", ".join(f"{name} {getattr(plan.mesh, name)}" for name in COLUMNS)
    return (
        f"world_size={config.world_size}: none of {found.num_legal:,} legal layouts fits "
        f"{config.machine.memory_gib:,.1f} GiB of machine={config.machine.name}; the closest "
        f"({mesh}) lacks {lacks:,.1f} GiB (largest: {', '.join(rank.largest)}); use more devices, "
        "a larger machine, or shorter rows (train.seq_length)"
    )


def _table(layouts: list[Layout]) -> str:
    """Return one line per layout."""
    head = ["tokens/s", "step s", "of peak", "GiB", *COLUMNS, "mbs", "opt", "recomputed"]
    lines = [head]
    for one in layouts:
        parallel = one.plan.config.parallel
        modules = "+".join(parallel.recompute_modules)
        lines.append(
            [
                *(f"{one.timing.tokens_per_s:,.0f}", f"{one.timing.step_s:.3f}"),
                *(f"{one.timing.utilisation:.1%}", f"{one.memory.total / GIB:.1f}"),
                *(str(getattr(one.plan.mesh, name)) for name in COLUMNS),
                str(one.plan.batch.micro_batch_size),
                "sharded" if parallel.use_distributed_optimizer else "whole",
                modules or str(parallel.recompute_granularity or "nothing"),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = (zip(line, widths, strict=True) for line in lines)
    return "".join("  ".join(f"{text:>{width}}" for text, width in row) + "\n" for row in rows)


def _write(found: Found, path: str) -> None:
    """Write the layouts as JSON."""
    record = [
        {
            "overrides": one.overrides,
            "memory": {**dataclasses.asdict(one.memory), "total_bytes": one.memory.total},
            "timing": {**dataclasses.asdict(one.timing), "step_s": one.timing.step_s},
        }
        for one in found.layouts
    ]
    try:
        Path(path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"json={path} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
