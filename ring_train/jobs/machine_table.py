"""What a plan needs of its machine and how long it takes, as rows of a table."""

from ring_train.plan import Plan, RankMemory, make_memory, make_timing

Row = tuple[str, str]
GIB = 2**30


def machine_rows(plan: Plan) -> list[Row]:
    """Return memory of the worst rank and, with a machine, time and cost."""
    ranks = make_memory(plan)
    rank = max(ranks, key=lambda one: one.total)
    machine = plan.config.machine
    limit = f" of {machine.memory_gib:,.1f}" if machine.name else ""
    which = f"pipeline rank {rank.pipeline_rank}" if len(ranks) > 1 else "each rank"
    rows = [("memory", f"{rank.total / GIB:,.2f} GiB{limit}, predicted peak of {which}")]
    rows += [("", part) for part in memory_parts(rank)]
    if len(ranks) > 1:
        others = ", ".join(f"{one.total / GIB:,.1f}" for one in ranks)
        rows.append(("", f"pipeline ranks in order: {others} GiB"))
    if rank.host_bytes:
        rows.append(("", f"host memory of a save: {rank.host_bytes / GIB:,.2f} GiB"))
    return rows + (_time_rows(plan) if machine.name else [])


def memory_parts(rank: RankMemory) -> list[str]:
    """Return the parts, two lines of them."""
    parts = [f"{name} {size / GIB:,.2f}" for name, size in rank.parts.items()]
    return [", ".join(parts[:4]), ", ".join(parts[4:])]


def _time_rows(plan: Plan) -> list[Row]:
    timing, machine = make_timing(plan), plan.config.machine
    kind = "measured in part" if machine.measured else "not measured"
    rows = [
        ("machine", f"{machine.name}, figures {kind}: {machine.source}"),
        (
            "time",
            f"{timing.step_s:,.3f} s a step, an estimate: {timing.tokens_per_s:,.0f} tokens/s",
        ),
        ("", f"{timing.tokens_per_day:.3e} tokens a day, {timing.utilisation:.1%} of the peak"),
    ]
    parts = sorted(timing.parts.items(), key=lambda part: -part[1])
    rows += [
        ("", f"{seconds / timing.step_s:6.1%}  {seconds:,.4f} s  {name}")
        for name, seconds in parts
        if seconds
    ]
    rows.append(("whole run", f"{timing.run_days:,.1f} days of {plan.mesh.world_size:,} devices"))
    if timing.cost is not None:
        rows.append(("cost", f"{timing.cost:,.0f} at {machine.price_per_gpu_hour:g} a device hour"))
    return rows
