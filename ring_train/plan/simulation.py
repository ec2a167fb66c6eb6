"""How long a pipeline takes whose stages take unequal times: 1F1B, pass by pass."""

from collections.abc import Sequence

Pass = tuple[int, int, bool]
"""(chunk, micro batch, is a forward)."""


def pipeline_seconds(
    forward: Sequence[float], backward: Sequence[float], pp: int, num_micro_batches: int
) -> float:
    """Return the time from the first forward to the last backward of a step.

    Args:
        forward: seconds of a micro batch in each virtual stage; stage = chunk * pp + rank.
        backward: the same of the backward pass.
        pp: pipeline ranks.
        num_micro_batches: a multiple of pp where there are several chunks.
    """
    stages = len(forward)
    orders = [pass_order(pp, stages // pp, rank, num_micro_batches) for rank in range(pp)]
    done: dict[tuple[int, int, bool], float] = {}
    clock, at = [0.0] * pp, [0] * pp
    left = sum(map(len, orders))
    while left:
        before = left
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                chunk, batch, is_forward = order[at[rank]]
                stage = chunk * pp + rank
                ready = _ready(done, stage, batch, is_forward, stages)
                if ready is None:
                    break
                seconds = forward[stage] if is_forward else backward[stage]
                clock[rank] = max(clock[rank], ready) + seconds
                done[stage, batch, is_forward] = clock[rank]
                at[rank] += 1
                left -= 1
        assert left < before, "the schedule waits for itself"
    return max(clock)


def _ready(
    done: dict[tuple[int, int, bool], float], stage: int, batch: int, is_forward: bool, stages: int
) -> float | None:
    """Return when the input of a pass is there; None = not yet known."""
    if is_forward:
        return 0.0 if stage == 0 else done.get((stage - 1, batch, True))
    if stage == stages - 1:
        return done.get((stage, batch, True))
    return done.get((stage + 1, batch, False))


def pass_order(pp: int, vpp: int, rank: int, num_micro_batches: int) -> list[Pass]:
    """Return the passes of a rank in megatron's order: warm up, one forward one backward, drain.

    Source: megatron-core 0.19.2 `pipeline_parallel/schedules.py`.
    """
    total = num_micro_batches * vpp
    warmup = pp - rank - 1 if vpp == 1 else 2 * (pp - rank - 1) + (vpp - 1) * pp
    warmup = total if vpp > 1 and num_micro_batches == pp else min(warmup, total)

    def at(k: int, is_forward: bool) -> Pass:
        if vpp == 1:
            return 0, k, is_forward
        chunk = k // pp % vpp
        batch = k // (pp * vpp) * pp + k % pp
        return (chunk if is_forward else vpp - 1 - chunk), batch, is_forward

    order = [at(k, True) for k in range(warmup)]
    for k in range(total - warmup):
        order += [at(warmup + k, True), at(k, False)]
    return order + [at(k, False) for k in range(total - warmup, total)]
