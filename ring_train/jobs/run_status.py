"""Where a run stands, as figures, from the files of its folder. Imports neither torch nor plan."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ring_train.jobs.run_files import read_events, read_record, read_tail
from ring_train.resilience.goodput import Account, make_account
from ring_train.resilience.run_lock import LOCK_FILE, renewed_at

DEAD_S = 60.0
"""A lock that is not renewed for so long is that of a dead job."""
RECENT = 20
"""Records that speed and trend are taken from."""
SLOW_RATIO = 1.1
"""A rank this much slower than the median is a straggler."""


@dataclass(frozen=True, kw_only=True)
class Domain:
    """What is known about one domain."""

    loss: float | None
    """Training loss of the last record, nats."""
    loss_per_100_steps: float | None
    validation_loss: float | None
    tokens: int | None
    """Read so far."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a run stands; times in Unix seconds, durations in seconds."""

    run_dir: str
    state: str
    """starting, running, dead, finished, stopped or failed."""
    reason: str
    now: float
    step: int
    num_steps: int | None
    tokens: int | None
    total_tokens: int | None
    lm_loss: float | None
    loss_per_100_steps: float | None
    """Slope over the last records."""
    step_s: float | None
    """Median of the last records, training alone."""
    tokens_per_s: float | None
    wall_s_per_step: float | None
    """Of this attempt: with data, saving, validation."""
    remaining_s: float | None
    """Without trouble."""
    ends_at: float | None
    """Without trouble; None unless it is running."""
    last_progress_at: float | None
    longest_silence_s: float | None
    """Between the last records of progress of this attempt."""
    checkpoint_step: int | None
    checkpoint_at: float | None
    bad_steps: tuple[Mapping[str, Any], ...]
    roll_backs: tuple[Mapping[str, Any], ...]
    straggler_ratios: Mapping[int, float]
    """Own seconds of the slowest ranks over the median, mean of the last records."""
    domains: Mapping[str, Domain]
    account: Account

    def record(self) -> dict[str, Any]:
        """Return everything as JSON."""
        others = {k: v for k, v in vars(self).items() if k not in ("account", "domains")}
        return {
            **others,
            "domains": {name: asdict(domain) for name, domain in self.domains.items()},
            "goodput": self.account.record(),
            "attempts": [asdict(attempt) for attempt in self.account.attempts],
        }


def read_status(run_dir: Path, now: float) -> Status:
    """Return where a run stands.

    Raises:
        UserError: the folder is not a run's.
    """
    events = read_events(run_dir)
    outcome = read_record(run_dir / "outcome.json")
    alive = renewed_at(run_dir / LOCK_FILE)
    is_running = alive is not None and now - alive < DEAD_S
    account = make_account(events, alive=now if is_running else alive, is_running=is_running)
    metrics, timing = (read_tail(run_dir / f"{name}.jsonl") for name in ("metrics", "timing"))
    progress = [event for event in events if event["event"] == "progress"]
    step = max(_last(account), _int(outcome.get("step")) or 0)
    num_steps = _int(outcome.get("num_steps")) or _last_int(events, "num_steps")
    total_tokens = _int(read_record(run_dir / "plan.json").get("total_tokens"))
    tokens = _int(progress[-1].get("tokens")) if progress else None
    marks = _marks(events)
    pace = _wall_s_per_step(marks)
    remaining = None if pace is None or num_steps is None else pace * max(num_steps - step, 0)
    since = progress[-1]["time"] if progress else None
    state, reason = _state(is_running, alive, outcome, events, now)
    saved = [event for event in events if event["event"] == "saved"]
    return Status(
        **{"run_dir": str(run_dir), "state": state, "reason": reason, "now": now},
        **{"step": step, "num_steps": num_steps, "tokens": tokens, "total_tokens": total_tokens},
        lm_loss=_value(metrics, "lm_loss"),
        loss_per_100_steps=slope_per_100_steps(metrics[-RECENT:], "lm_loss"),
        step_s=_median(timing, "step_s"),
        tokens_per_s=_median(timing, "tokens_per_s"),
        wall_s_per_step=pace,
        remaining_s=remaining,
        ends_at=max((since or now) + remaining, now) if is_running and remaining else None,
        last_progress_at=since,
        longest_silence_s=max((b[0] - a[0] for a, b in pairwise(marks)), default=None),
        checkpoint_step=_int(saved[-1].get("step")) if saved else None,
        checkpoint_at=saved[-1]["time"] if saved else None,
        bad_steps=tuple(event for event in events if event["event"] == "bad_step"),
        roll_backs=tuple(event for event in events if event["event"] == "roll_back"),
        straggler_ratios=straggler_ratios(read_tail(run_dir / "stragglers.jsonl")[-RECENT:]),
        domains=_domains(run_dir, metrics),
        account=account,
    )


def _state(
    is_running: bool,
    alive: float | None,
    outcome: Mapping[str, Any],
    events: Sequence[Mapping[str, Any]],
    now: float,
) -> tuple[str, str]:
    """Return state and reason."""
    if is_running:
        last = max(i for i, e in enumerate(events) if e["event"] == "start" or i == 0)
        ready = any(event["event"] in ("ready", "progress") for event in events[last:])
        return ("running" if ready else "starting"), ""
    if alive is not None:
        return "dead", f"{LOCK_FILE} was renewed {now - alive:.0f} s ago for the last time"
    state = str(outcome.get("state", ""))
    if state in ("finished", "stopped", "failed"):
        return state, str(outcome.get("reason") or "")
    return "dead", f"{LOCK_FILE} is gone, and no end was told"


def _last(account: Account) -> int:
    return account.attempts[-1].last_step or 0 if account.attempts else 0


def _int(value: object) -> int | None:
    return value if type(value) is int else None


def _last_int(events: Sequence[Mapping[str, Any]], key: str) -> int | None:
    found = (_int(event.get(key)) for event in reversed(events))
    return next((value for value in found if value is not None), None)


def _value(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the newest value of a key."""
    found = (record[key] for record in reversed(records) if _is_figure(record.get(key)))
    return next(found, None)


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float)


def _median(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [record[key] for record in records[-RECENT:] if _is_figure(record.get(key))]
    return statistics.median(values) if values else None


def slope_per_100_steps(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the least-squares slope of a figure over the steps of records; None for too few."""
    points = [(r["step"], r[key]) for r in records if _is_figure(r.get(key))]
    if len({step for step, _ in points}) < 3:
        return None
    return 100 * statistics.linear_regression(*zip(*points, strict=True)).slope


def _marks(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, int]]:
    """Return (time, step) of the last progress records without a start between."""
    marks: list[tuple[float, int]] = []
    for event in events:
        name, step = event["event"], _int(event.get("step"))
        if name in ("start", "roll_back"):
            marks = []
        elif name in ("resume", "init"):
            marks = [(event["time"], step or 0)]
        elif name == "ready" and marks:
            marks = [(event["time"], marks[0][1])]
        elif name == "progress" and step is not None:
            marks.append((event["time"], step))
    return marks[-RECENT - 1 :]


def _wall_s_per_step(marks: Sequence[tuple[float, int]]) -> float | None:
    """Return wall seconds per step; None for too few records."""
    if not marks:
        return None
    (begin, first), (end, last) = marks[0], marks[-1]
    return (end - begin) / (last - first) if last > first else None


def straggler_ratios(records: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return {rank: own seconds over the median rank's} of the slow ranks, slowest first.

    Only the records of the newest number of ranks count.
    """
    rows = [r["step_s"] for r in records if isinstance(r.get("step_s"), list) and r["step_s"]]
    rows = [row for row in rows if len(row) == len(rows[-1])]
    if not rows or any(not _is_figure(value) for row in rows for value in row):
        return {}
    means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    median = statistics.median_low(means)
    if median <= 0:
        return {}
    ratios = {rank: mean / median for rank, mean in enumerate(means)}
    slowest = sorted(ratios, key=lambda rank: -ratios[rank])
    return {rank: ratios[rank] for rank in slowest if ratios[rank] >= SLOW_RATIO}


def _domains(run_dir: Path, metrics: Sequence[Mapping[str, Any]]) -> dict[str, Domain]:
    """Return what the last records say of each domain."""
    validation = read_tail(run_dir / "validation.jsonl")
    ledgers = read_tail(run_dir / "ledger.jsonl")
    phases = ledgers[-1].get("tokens", {}) if ledgers else {}
    read = {name for domains in phases.values() for name in domains}
    prefix = "trained_tokens/"
    trained = {k[len(prefix) :] for r in metrics[-1:] for k in r if k.startswith(prefix)}
    return {
        name: Domain(
            loss=_value(metrics[-RECENT:], f"lm_loss/{name}"),
            loss_per_100_steps=slope_per_100_steps(metrics[-RECENT:], f"lm_loss/{name}"),
            validation_loss=_value(validation, f"valid_loss/{name}"),
            tokens=sum(d.get(name, 0) for d in phases.values()) if name in read else None,
        )
        for name in sorted(read | trained)
    }
