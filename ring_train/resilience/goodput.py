"""Where the wall time of a run went, from its journal: productive, or lost to which cause.

Unusual: time is counted in whole microseconds, so that the parts add up to the total exactly. A
step counts as productive once: what a later start or a roll-back trained again is `redone`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ring_train.resilience.work import PRODUCTIVE, REDONE, SKIPPED, Work

STARTUP = "startup"
HANG = "hang"
UNKNOWN = "unknown"
OTHER = "other"
DOWN = "down"
CAUSES = {
    PRODUCTIVE: "steps that count",
    REDONE: "steps trained again after a crash or a roll-back",
    SKIPPED: "bad steps computed again, passed over or rolled back",
    STARTUP: "from the start of the job to its first step",
    "data": "waiting for batches",
    "save": "saving, as far as training waited for it",
    "validate": "held-out loss",
    "evaluate": "answers to problems",
    "log": "figures and records",
    "profile": "writing traces of steps",
    "roll_back": "restoring an older checkpoint",
    HANG: "no step, until the watchdog ended the job",
    UNKNOWN: "from the last record of a job that was killed or failed to its death",
    OTHER: "between records, without a cause",
    DOWN: "between the end of a job and the next start",
}
"""In the order of tables, and what they mean; a journal may name more."""

FINISHED, STOPPED, FAILED, HUNG, KILLED, RUNNING = (
    *("finished", "stopped", "failed", "hung", "killed", "running"),
)
ENDINGS = {"finish": FINISHED, "stop": STOPPED, "error": FAILED, "hang": HUNG}
"""Event -> how it ends an attempt; the first one of an attempt counts."""
BEGUN = ("resume", "init")
READY = ("ready", "progress")
FAILURES = (FAILED, HUNG, KILLED)
SECOND = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of the run and what became of it."""

    number: int
    started: float
    """Unix seconds."""
    ended: float
    """Unix seconds of the last sign of life."""
    world_size: int | None
    first_step: int | None
    """Steps that were done when it began; None if it never got so far."""
    last_step: int | None
    """Steps that were done when it was last heard of."""
    ending: str
    """One of the endings."""
    detail: str
    """Why, in the words of the journal."""


@dataclass(frozen=True)
class Account:
    """Wall time since the first start, by cause."""

    parts_us: dict[str, int]
    """Microseconds by cause; only what is not zero. They add up to `total_us`."""
    total_us: int
    attempts: tuple[Attempt, ...]

    @property
    def goodput(self) -> float | None:
        """Productive share of all time; None if no time has passed."""
        return self.parts_us.get(PRODUCTIVE, 0) / self.total_us if self.total_us else None

    @property
    def failures(self) -> int:
        """Attempts that ended by an error, a hang or a kill."""
        return sum(attempt.ending in FAILURES for attempt in self.attempts)

    @property
    def mtbf_s(self) -> float | None:
        """Mean seconds of running per failure; None without a failure."""
        up_us = self.total_us - self.parts_us.get(DOWN, 0)
        return up_us / SECOND / self.failures if self.failures else None

    def record(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        return {
            "goodput": self.goodput,
            "total_s": self.total_us / SECOND,
            "parts_s": {cause: us / SECOND for cause, us in ordered(self.parts_us).items()},
            "attempts": len(self.attempts),
            "failures": self.failures,
            "mtbf_s": self.mtbf_s,
        }


def ordered(parts: Mapping[str, int]) -> dict[str, int]:
    """Return parts in the order of CAUSES, others after them."""
    return {cause: parts[cause] for cause in [*CAUSES, *sorted(parts)] if cause in parts}


def make_account(
    events: Iterable[Mapping[str, Any]], *, alive: float | None = None, is_running: bool = False
) -> Account:
    """Return where the time went.

    Args:
        events: records of a journal, in its order; what is no record is left out.
        alive: Unix seconds at which the last attempt was last seen alive, if it has told no end.
        is_running: whether that attempt is alive now; then time since its last progress is left
            out: what it was will be known at the next.
    """
    walk = _Walk()
    attempts = []
    groups = list(_by_attempt(events))
    for index, group in enumerate(groups):
        is_last = index + 1 == len(groups)
        following = None if is_last else groups[index + 1][0]
        seen = alive if is_last else _seen_alive(following)
        attempts.append(walk.attempt(group, seen, is_running=is_last and is_running))
    return Account({k: v for k, v in walk.parts.items() if v}, walk.total_us, tuple(attempts))


def _seen_alive(start: Mapping[str, Any] | None) -> float | None:
    """Return when the attempt before a start was last seen alive, if the start says so."""
    seen = None if start is None else start.get("previous_alive")
    return float(seen) if isinstance(seen, int | float) and math.isfinite(seen) else None


def _by_attempt(events: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    """Yield the records of each attempt; late words of an older one belong to nobody."""
    group: list[Mapping[str, Any]] = []
    for event in events:
        number, name = event.get("attempt"), event.get("event")
        if not (_is_number(event.get("time")) and isinstance(number, int) and name):
            continue
        if group and number < group[0]["attempt"]:
            continue
        if group and (number > group[0]["attempt"] or name == "start"):
            yield group
            group = []
        group.append(event)
    if group:
        yield group


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _microseconds(value: object) -> int:
    """Return seconds of a record in microseconds; 0 for what is no duration."""
    return (
        max(round(value * SECOND), 0) if isinstance(value, int | float) and _is_number(value) else 0
    )


@dataclass
class _Walk:
    """Goes through the records in order and gives every microsecond to one cause."""

    parts: Counter[str] = field(default_factory=Counter)
    begin: int | None = None
    now: int = 0
    work: Work = field(default_factory=Work)
    saved: bool = False
    """Whether there was a save since the last progress."""

    @property
    def total_us(self) -> int:
        """Since the first record."""
        return self.now - (self.now if self.begin is None else self.begin)

    def attempt(
        self, events: list[Mapping[str, Any]], alive: float | None, *, is_running: bool
    ) -> Attempt:
        """Account for one attempt and return what became of it."""
        first = events[0]
        # The process has begun before it could write a record.
        launched = first.get("launched")
        self._spend(DOWN, _time({"time": launched}) if _is_number(launched) else _time(first))
        started = self.now / SECOND
        begun = next((_begun(event) for event in events if event["event"] in BEGUN), None)
        end = next((event for event in events if event["event"] in ENDINGS), None)
        told = None if end is None else ENDINGS[end["event"]]
        self.saved = False
        ready = next((i for i, e in enumerate(events) if e["event"] in READY), len(events))
        for event in events[:ready]:
            self._spend(STARTUP, _time(event))
            self._take(event)
        for event in events[ready:]:
            self._take(event)
        is_ready = ready < len(events)
        if told is None and alive is not None and not (is_running and is_ready):
            self._spend(UNKNOWN if is_ready else STARTUP, round(alive * SECOND))
        if not is_running:
            self._spend(OTHER if told in (FINISHED, STOPPED) else UNKNOWN, _time(events[-1]))
        return Attempt(
            number=first["attempt"],
            started=started,
            ended=self.now / SECOND,
            world_size=first.get("world_size"),
            first_step=begun,
            last_step=None if begun is None else self.work.step,
            ending=told or (RUNNING if is_running else KILLED),
            detail=_detail(end),
        )

    def _spend(self, cause: str, until: int) -> None:
        """Give the time up to `until` to a cause; clocks that run backwards give nothing."""
        if self.begin is None:
            self.begin = self.now = until
        if until > self.now:
            self.parts[cause] += until - self.now
            self.now = until

    def _take(self, event: Mapping[str, Any]) -> None:
        """Account for one record."""
        name, now = event["event"], _time(event)
        if name in BEGUN:
            self.parts.update(self.work.restart(_begun(event)))
        elif name == "ready":
            self._spend(STARTUP, now)
        elif name == "progress":
            self._progress(event, now)
        elif name == "roll_back" and _are_steps(event.get("from_step"), event.get("to_step")):
            self.parts.update(self.work.roll_back(event["from_step"], event["to_step"]))
        elif name == "bad_step":
            self.work.bad_step(event.get("decision"))
        elif name == "saved":
            self.saved = True
        elif name == "hang":
            self._spend(UNKNOWN, now - _microseconds(event.get("seconds")))
            self._spend(HANG, now)
        elif name in ("stop", "finish"):
            self._spend("save" if self.saved else OTHER, now)

    def _progress(self, event: Mapping[str, Any], now: int) -> None:
        """Share the time since the last progress out by the seconds of each cause."""
        step = event["step"] if _are_steps(event.get("step")) else self.work.step
        given = event.get("seconds")
        named = given if isinstance(given, Mapping) else {}
        seconds = {str(cause): _microseconds(value) for cause, value in named.items()}
        seconds.setdefault("step", 0)
        elapsed, told = max(now - self.now, 0), sum(seconds.values())
        for cause, claimed in seconds.items():
            # Clocks of journal and loop differ by a little.
            us = claimed * elapsed // told if told > elapsed else claimed
            self.parts.update(self.work.progress(step, us) if cause == "step" else {cause: us})
            self.now += us
        self._spend(OTHER, now)
        self.saved = False


def _are_steps(*values: object) -> bool:
    return all(type(value) is int for value in values)


def _begun(event: Mapping[str, Any]) -> int:
    """Return the steps done where an attempt begins."""
    step = event.get("step")
    return step if event["event"] == "resume" and isinstance(step, int) else 0


def _time(event: Mapping[str, Any]) -> int:
    return round(event["time"] * SECOND)


def _detail(end: Mapping[str, Any] | None) -> str:
    """Return why an attempt ended, in a few words."""
    if end is None:
        return ""
    if end["event"] == "hang":
        return f"rank {end.get('rank')} in {end.get('phase')} for {end.get('seconds')} s"
    return str(end.get("reason") or end.get("message") or "").strip().split("\n")[0]
