"""What a soak has shown so far: `python -m tests.chaos.soak_report folder=DIR`.

Reads the folder that tests.chaos.soak writes, also in the middle of a soak, and writes
docs/results/soak.md and docs/images/soak.png.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_train.resilience.goodput import CAUSES, SECOND, Account, make_account, ordered
from ring_train.resilience.journal import read_journal

ROOT = Path(__file__).parents[2]
SETTLED_S = 120.0
"""After the start of its process a rank still imports, compiles and fills caches."""
MB = 1e6
DEADLY = {"kill": "SIGKILL", "freeze": "SIGSTOP", "preempt": "SIGTERM"}


@dataclass(frozen=True)
class Soak:
    """The records of a soak."""

    events: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    faults: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    report: dict[str, Any] | None
    """None = it runs."""

    @property
    def ranks(self) -> list[int]:
        """Those that were sampled."""
        return sorted({sample["rank"] for sample in self.samples})

    @property
    def elapsed_s(self) -> float:
        """Seconds from the first start to the end, or to the last record."""
        if self.report is not None:
            return self.report["elapsed_s"]
        return max(r["after_s"] for r in (*self.samples, *self.faults, *self.starts))

    @property
    def began(self) -> float:
        """Unix seconds."""
        return self.events[0]["launched"]

    def named(self, *names: str) -> list[dict[str, Any]]:
        """Return the events of some names."""
        return [event for event in self.events if event["event"] in names]


def read_soak(folder: Path) -> Soak:
    """Return the records of a soak folder."""
    report = folder / "report.json"
    return Soak(
        events=read_journal(folder / "run"),
        samples=_lines(folder / "samples.jsonl"),
        faults=_lines(folder / "faults.jsonl"),
        starts=_lines(folder / "starts.jsonl"),
        report=json.loads(report.read_text()) if report.exists() else None,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text() if path.exists() else ""
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    # A process that has just died has no memory and no files.
    return [record for record in records if record.get("handles") != 0]


def settled(soak: Soak, rank: int) -> dict[int, list[dict[str, Any]]]:
    """Return the samples of a rank by start of the run, without each one's first minutes."""
    groups = defaultdict(list)
    for sample in soak.samples:
        if sample["rank"] == rank:
            groups[sample["attempt"]].append(sample)
    kept = {}
    for attempt, group in groups.items():
        late = [s for s in group if s["after_s"] >= group[0]["after_s"] + SETTLED_S]
        if len(late) > 1:
            kept[attempt] = late
    return kept


def slope_per_hour(groups: Iterable[Sequence[dict[str, Any]]], key: str) -> float:
    """Return the common growth an hour of a figure within starts, each with a level of its own."""
    above = below = 0.0
    for group in groups:
        time = statistics.fmean(sample["after_s"] for sample in group)
        level = statistics.fmean(sample[key] for sample in group)
        above += sum((s["after_s"] - time) * (s[key] - level) for s in group)
        below += sum((s["after_s"] - time) ** 2 for s in group)
    return 3600 * above / below if below else math.nan


def unexplained(soak: Soak) -> dict[int, bool]:
    """Return the starts that ended badly though neither SIGKILL nor SIGSTOP struck them.

    Each with whether its checkpoint was durable and `stop` told before that.
    """
    struck = {fault["attempt"] for fault in soak.faults if fault["kind"] in ("kill", "freeze")}
    before, found = 0.0, {}
    for start in soak.starts:
        if start["attempt"] not in struck and set(start["statuses"]) - {0, 75}:
            times = [event["time"] - soak.began for event in soak.named("stop", "finish")]
            found[start["attempt"]] = any(before < t < start["after_s"] for t in times)
        before = start["after_s"]
    return found


def recoveries(soak: Soak, account: Account) -> dict[str, list[float]]:
    """Return the seconds from each end to the next first step, by how the run ended."""
    ready = {event["attempt"]: event["time"] for event in soak.named("ready")}
    seconds = defaultdict(list)
    for attempt in account.attempts:
        if (at := ready.get(attempt.number + 1)) is not None:
            seconds[attempt.ending].append(at - attempt.ended)
    return seconds


def text_of(soak: Soak) -> str:
    """Return docs/results/soak.md."""
    alive = soak.samples[-1]["after_s"] + soak.began if soak.samples else None
    account = make_account(soak.events, alive=alive, is_running=soak.report is None)
    steps = max((e["step"] for e in soak.named("progress")), default=0)
    ending = "It runs still." if soak.report is None else f"{soak.report['compared']}."
    sections = [
        "# A soak under random faults",
        "The tiny model (ep2 x dp2, distributed optimizer) trains on four CPU ranks of one shared "
        "machine of two cores while ranks are killed, frozen, preempted and their disks and "
        "gradients made to fail, at random moments; a supervisor starts it again, and no person "
        "does anything. Repeat it with",
        "    .venv/bin/python -m tests.chaos.soak minutes=120 folder=runs/soak\n"
        "    .venv/bin/python -m tests.chaos.soak_report folder=runs/soak",
        f"{soak.elapsed_s / 60:.0f} minutes, {len(soak.ranks)} ranks, {steps} steps, "
        f"{len(account.attempts)} starts, goodput {100 * (account.goodput or 0):.1f} %. {ending}",
        "![step, memory and handles over time](../images/soak.png)",
        *("## Faults", _faults(soak)),
        *("## Starts", _starts(soak, account)),
        *("## Where the time went", _goodput(account)),
        *("## Memory and file handles", _memory(soak)),
    ]
    return "\n\n".join(sections) + "\n"


def _faults(soak: Soak) -> str:
    outside = Counter(fault["kind"] for fault in soak.faults)
    inside = Counter(event["kind"] for event in soak.named("fault"))
    bad = soak.named("bad_step")
    decisions = Counter(event["decision"] for event in bad)
    injected = {e["step"] for e in soak.named("fault") if e["kind"] in ("nan", "spike")}
    own = {event["step"] for event in bad} - injected
    rows = [[f"{kind} ({DEADLY[kind]})", str(n), "outside"] for kind, n in outside.most_common()]
    rows += [[kind, str(count), "inside"] for kind, count in inside.most_common()]
    told = ", ".join(f"{name} {count}" for name, count in decisions.most_common()) or "none"
    return (
        _table(["fault", "times", "from"], rows)
        + f"\n\nDecisions about bad steps: {told}. {len(own)} of these steps are spikes that the "
        f"tiny model has by itself (`spike_sigma=6`); {_same(bad, own)} of them were the same to "
        "the last bit when computed again. Saves that failed and were tried again: "
        f"{len(soak.named('save_failed'))}; saves that are durable: {len(soak.named('saved'))}."
    )


def _same(bad: list[dict[str, Any]], steps: set[int]) -> int:
    """Return how many steps were as bad when they were computed again."""
    figures = defaultdict(set)
    for event in bad:
        figures[event["step"]].add((event["lm_loss"], event["grad_norm"]))
    return sum(len(figures[step]) == 1 for step in steps)


def _starts(soak: Soak, account: Account) -> str:
    statuses = Counter(" ".join(map(str, sorted(s["statuses"]))) for s in soak.starts)
    rows = [[text, str(count)] for text, count in statuses.most_common()]
    bad = unexplained(soak)
    verdict = "Starts that ended otherwise than with 0 or 75 were struck by SIGKILL or SIGSTOP."
    for number, is_saved in bad.items():
        why = "was durable and `stop` told: the supervisor waited 4 s for the last rank to leave"
        verdict += f" Start {number} ended " + (
            f"so after its checkpoint {why}." if is_saved else "so UNEXPLAINED."
        )
    stops = [e["seconds"] for e in soak.named("stop") if e.get("seconds") is not None]
    back = [
        [ending, str(len(seconds)), f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"]
        for ending, seconds in sorted(recoveries(soak, account).items())
    ]
    return "\n\n".join(
        [
            _table(["exit statuses of the ranks (negative: signal)", "times"], rows),
            verdict,
            f"SIGTERM to durable checkpoint and end of the loop: {len(stops)} times, median "
            f"{statistics.median(stops):.1f} s, longest {max(stops):.1f} s."
            if stops
            else "No SIGTERM yet.",
            "From the last sign of life to the next first step, in seconds:",
            _table(["ending", "times", "median", "longest"], back),
        ]
    )


def _goodput(account: Account) -> str:
    rows = [
        [cause, f"{us / SECOND:.1f}", f"{100 * us / account.total_us:.2f}", CAUSES.get(cause, "")]
        for cause, us in ordered(account.parts_us).items()
    ]
    mean = "none" if account.mtbf_s is None else f"{account.mtbf_s:.0f} s"
    return (
        _table(["cause", "seconds", "%", ""], rows)
        + f"\n\nThe parts add up to the {account.total_us / SECOND:.1f} s of the journal. "
        f"{account.failures} failures, one in {mean} of running."
    )


def _memory(soak: Soak) -> str:
    rows = []
    for rank in soak.ranks:
        groups = settled(soak, rank)
        samples = [sample for group in groups.values() for sample in group]
        if not samples:
            continue
        hours = sum(g[-1]["after_s"] - g[0]["after_s"] for g in groups.values()) / 3600
        memory = [sample["private_bytes"] / MB for sample in samples]
        handles = [sample["handles"] for sample in samples]
        longest = max(groups.values(), key=lambda group: group[-1]["after_s"] - group[0]["after_s"])
        first, last = (longest[i]["private_bytes"] / MB for i in (0, -1))
        rows.append(
            [
                *(str(rank), f"{hours:.2f}", f"{statistics.fmean(memory):.0f}"),
                f"{slope_per_hour(groups.values(), 'private_bytes') / MB:+.1f}",
                f"{first:.0f} to {last:.0f}",
                f"{min(handles)} to {max(handles)}",
                f"{slope_per_hour(groups.values(), 'handles'):+.2f}",
                f"{slope_per_hour([longest[len(longest) // 2 :]], 'private_bytes') / MB:+.1f}",
            ]
        )
    head = ["rank", "hours", "mean MB", "MB an hour", "longest start, MB", "handles", "an hour"]
    head.append("MB an hour in the second half of the longest start")
    return (
        f"Sampled every 10 s; the first {SETTLED_S:.0f} s of each start are left out, and growth "
        "is fitted within starts, each with a level of its own (forks and cold processes differ). "
        "Memory of a start rises toward a level, so the last column looks at its end.\n\n"
        + _table(head, rows)
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(words: list[str]) -> None:
    """Write the report and the picture."""
    from tests.chaos.soak_picture import draw

    given = dict(word.split("=", 1) for word in words)
    soak = read_soak(Path(given["folder"]))
    docs = Path(given.get("docs", str(ROOT / "docs")))
    for folder in (docs / "results", docs / "images"):
        folder.mkdir(parents=True, exist_ok=True)
    (docs / "results" / "soak.md").write_text(text_of(soak))
    draw(soak, docs / "images" / "soak.png")
    sys.stdout.write(f"{docs}/results/soak.md\n")


if __name__ == "__main__":
    main(sys.argv[1:])
