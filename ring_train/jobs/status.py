"""Where a run stands and when it will end: `python -m ring_train.jobs.status RUN_DIR`.

Reads the files of the run folder and disturbs nothing; a run on other machines is as good as one
here, if the folder is shared and the clocks agree. `json=FILE` receives everything, `watch_s=10`
prints again and again. Imports no torch. Exits 2 if the folder is not a run's.
"""

import datetime
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ring_train.config import StatusConfig, compose
from ring_train.errors import UserError
from ring_train.jobs.results import write_json
from ring_train.jobs.run_status import Status, read_status
from ring_train.resilience.goodput import CAUSES, SECOND, Attempt, ordered
from ring_train.runtime.errors import run_job

MAX_ATTEMPTS = 8
MAX_STRAGGLERS = 4
MAX_TEXT = 72
QUIET_S, QUIET_TIMES = 60.0, 3
"""A live job is remarked on that logs nothing for so long, and for so many times its longest
recent silence."""
CLEAR = "\x1b[H\x1b[2J"


def main(words: list[str]) -> None:
    """Print the status that the words ask for.

    Raises:
        UserError: a wrong word, or a folder that is not a run's.
    """
    config: StatusConfig = compose("status", [_word(word) for word in words])
    if config.watch_s is not None and not config.watch_s > 0:
        raise UserError(f"watch_s={config.watch_s} is not positive; give seconds, as in watch_s=10")
    run_dir = Path(config.run_dir)
    while True:
        status = read_status(run_dir, time.time())
        if config.json is not None:
            write_json(config.json, status.record())
        clear = CLEAR if config.watch_s and sys.stdout.isatty() else ""
        sys.stdout.write(clear + text_of(status))
        sys.stdout.flush()
        if not config.watch_s:
            return
        try:
            time.sleep(config.watch_s)
        except KeyboardInterrupt:
            return


def _word(word: str) -> str:
    """Return a bare path as the word it stands for."""
    name, equals, _ = word.partition("=")
    if equals and "/" not in name:
        return word
    quoted = word.replace("\\", "\\\\").replace("'", "\\'")
    return f"run_dir='{quoted}'"


def text_of(status: Status) -> str:
    """Return the status as a page of text."""
    pairs = [*_place(status), *_figures(status), *_troubles(status)]
    width = max(len(name) for name, _ in pairs)
    lines = [f"{name:<{width}}  {text}".rstrip() for name, text in pairs]
    tables = [_domains(status), _goodput(status), _attempts(status)]
    return "\n".join([*lines, *(line for table in tables if table for line in ["", *table])]) + "\n"


def _place(status: Status) -> Iterator[tuple[str, str]]:
    reason = f": {status.reason}" if status.reason else ""
    yield "run", status.run_dir
    yield "state", f"{status.state}{reason}{_quiet(status)}"
    of = f" of {status.num_steps:,}" if status.num_steps else ""
    share = f" ({status.step / status.num_steps:.1%})" if status.num_steps else ""
    yield "step", f"{status.step:,}{of}{share}"
    if status.tokens is not None:
        total = f" of {status.total_tokens:,}" if status.total_tokens else ""
        yield "tokens", f"{status.tokens:,}{total}"
    if status.state == "finished" or status.remaining_s is None:
        return
    if not status.remaining_s:
        yield "ends", "all steps are done"
        return
    left = f"{duration(status.remaining_s)} of running left"
    if status.ends_at is None:
        yield "ends", left
        return
    yield (
        "ends",
        f"{date(status.ends_at)}, in {duration(status.ends_at - status.now)}{_late(status)}",
    )


def _quiet(status: Status) -> str:
    """Return a remark on a live job that has said nothing for longer than it used to."""
    if status.state != "running" or status.last_progress_at is None:
        return ""
    silent = status.now - status.last_progress_at
    if silent < max(QUIET_S, QUIET_TIMES * (status.longest_silence_s or 0)):
        return ""
    return f", but no progress was logged for {duration(silent)}"


def _late(status: Status) -> str:
    """Return when it would end with as much lost to failures as so far."""
    account = status.account
    lost = sum(account.parts_us.get(cause, 0) for cause in ("down", "hang", "redone", "unknown"))
    kept = account.total_us - lost
    if not lost or not kept or status.ends_at is None:
        return ""
    after = (status.ends_at - status.now) * account.total_us / kept
    return f"; {date(status.now + after)} if as much is lost as so far"


def _figures(status: Status) -> Iterator[tuple[str, str]]:
    if status.lm_loss is not None:
        yield "loss", f"{status.lm_loss:.4f} nats{_trend(status.loss_per_100_steps)}"
    if status.step_s is not None and status.tokens_per_s is not None:
        speed = f"{status.step_s:.3g} s a step, {status.tokens_per_s:,.0f} tokens/s"
        wall = status.wall_s_per_step
        all_in = f"; {wall:.3g} s with data, saving and validation" if wall else ""
        yield "speed", speed + all_in
    if status.checkpoint_step is not None and status.checkpoint_at is not None:
        age = duration(status.now - status.checkpoint_at)
        yield "checkpoint", f"step {status.checkpoint_step:,}, {age} ago"
    else:
        yield "checkpoint", "none yet"


def _trend(slope: float | None) -> str:
    return "" if slope is None else f" ({slope:+.3g} per 100 steps)"


def _troubles(status: Status) -> Iterator[tuple[str, str]]:
    if status.straggler_ratios:
        slow = list(status.straggler_ratios.items())[:MAX_STRAGGLERS]
        text = ", ".join(f"rank {rank} {ratio:.2f} x the median" for rank, ratio in slow)
        more = len(status.straggler_ratios) - len(slow)
        yield "stragglers", text + (f", {more} more" if more else "")
    for event in status.bad_steps[-3:]:
        figures = ", ".join(f"{key} {_figure(event.get(key))}" for key in ("lm_loss", "grad_norm"))
        what = f"{event.get('cause')} ({figures}), {event.get('decision')}"
        yield "bad step", f"{event.get('step')}: {what}"
    if len(status.bad_steps) > 3:
        yield "", f"{len(status.bad_steps) - 3} more bad steps before"
    for event in status.roll_backs[-3:]:
        first, last = (event.get("skipped") or [None, None])[:2]
        steps = f"step {event.get('from_step')} to {event.get('to_step')}"
        yield "roll-back", f"{steps}, data of steps {first} to {last} passed over"


def _figure(value: object) -> str:
    """Return a figure of the journal, which writes NaN and Inf as words."""
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _domains(status: Status) -> list[str]:
    if not status.domains:
        return []
    total = sum(domain.tokens or 0 for domain in status.domains.values())
    rows = [("domain", "loss", "per 100 steps", "held out", "tokens", "share")]
    for name, domain in status.domains.items():
        share = f"{(domain.tokens or 0) / total:.1%}" if total else ""
        tokens = f"{domain.tokens:,}" if domain.tokens is not None else ""
        slope = "" if domain.loss_per_100_steps is None else f"{domain.loss_per_100_steps:+.3g}"
        rows.append((name, _nats(domain.loss), slope, _nats(domain.validation_loss), tokens, share))
    return aligned(rows)


def _nats(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _goodput(status: Status) -> list[str]:
    account = status.account
    if not account.total_us:
        return []
    rows = [("time", "", "share", "")]
    for cause, us in ordered(account.parts_us).items():
        share = f"{us / account.total_us:.1%}"
        rows.append((cause, duration(us / SECOND), share, CAUSES.get(cause, "")))
    mtbf = "" if account.mtbf_s is None else f", one each {duration(account.mtbf_s)} of running"
    failures = f"{account.failures} failure{'s' * (account.failures != 1)}{mtbf}"
    rows.append(("all", duration(account.total_us / SECOND), "100.0%", failures))
    return aligned(rows, texts=(0, 3))


def _attempts(status: Status) -> list[str]:
    attempts = status.account.attempts
    rows: list[tuple[str, ...]] = [("start", "at", "ran for", "ranks", "steps", "ended")]
    shown = attempts[-MAX_ATTEMPTS:]
    for attempt in shown:
        is_last = attempt is attempts[-1]
        rows.append(_attempt(attempt, status if is_last else None))
    earlier = len(attempts) - len(shown)
    return [*aligned(rows, texts=(1, 5)), *([f"{earlier} earlier starts"] if earlier else [])]


def _attempt(attempt: Attempt, status: Status | None) -> tuple[str, ...]:
    """Return the row of an attempt; `status` for the newest one."""
    steps = "none" if attempt.first_step is None else f"{attempt.first_step} to {attempt.last_step}"
    until = status.now if status and attempt.ending == "running" else attempt.ended
    ran = duration(until - attempt.started)
    ended = f"{attempt.ending}: {short(attempt.detail)}" if attempt.detail else attempt.ending
    ranks = "" if attempt.world_size is None else str(attempt.world_size)
    return str(attempt.number), date(attempt.started), ran, ranks, steps, ended


def aligned(rows: Sequence[Sequence[str]], texts: Sequence[int] = (0,)) -> list[str]:
    """Return rows as lines of columns; those in `texts` begin at the left, others end right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            f"{cell:<{width}}" if i in texts else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def short(text: str) -> str:
    """Return the beginning of a long text."""
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 4]} ..."


def date(at: float) -> str:
    """Return a time in the zone of this machine."""
    return datetime.datetime.fromtimestamp(at).astimezone().strftime("%a %Y-%m-%d %H:%M %Z")


def duration(seconds: float) -> str:
    """Return a duration in its two largest units."""
    left = max(seconds, 0.0)
    if left < 100:
        return f"{left:.0f} s" if left >= 10 else f"{left:.1f} s"
    minutes, hours, days = left / 60, left / 3600, left / 86400
    if minutes < 100:
        return f"{int(minutes)} min {int(left % 60)} s"
    if hours < 48:
        return f"{int(hours)} h {int(minutes % 60)} min"
    return f"{int(days)} d {int(hours % 24)} h"


if __name__ == "__main__":
    run_job(lambda: main(sys.argv[1:]))
