"""The table of a chaos session: `python -m tests.chaos.table results=FILE`.

Reads the lines that CHAOS_RESULTS received, and writes bench/results/chaos.json and the part of
docs/chaos.md between its two markers.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ring_train.resilience.faults import KINDS, PHASES

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- written by tests/chaos/table.py -->", "<!-- end -->"


def summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a session."""
    struck: Counter[tuple[str, str]] = Counter()
    survived: Counter[tuple[str, str]] = Counter()
    for record in records:
        faults = Counter((kind, phase) for kind, phase in record["struck"])
        struck += faults
        survived += faults if record["survived"] else Counter()
    stops = [s for record in records for s in record["stop_s"] if s is not None]
    return {
        "schedules": len(records),
        "survived": sum(record["survived"] for record in records),
        "seeds": sorted(record["seed"] for record in records),
        "failed_seeds": sorted(r["seed"] for r in records if not r["survived"]),
        "starts": sum(len(record["statuses"]) for record in records),
        "cpu_s": round(sum(record["cpu_s"] for record in records), 1),
        "stops": len(stops),
        "stop_median_s": round(statistics.median(stops), 3) if stops else None,
        "stop_longest_s": max(stops, default=None),
        "decisions": dict(Counter(d for record in records for d in record["decisions"])),
        "faults": [
            {"kind": kind, "phase": phase, "struck": count, "survived": survived[kind, phase]}
            for (kind, phase), count in sorted(struck.items())
        ],
    }


def table_of(figures: dict[str, Any]) -> str:
    """Return the figures as text: kind x phase, each survived / struck."""
    cells = {(f["kind"], f["phase"]): f"{f['survived']}/{f['struck']}" for f in figures["faults"]}
    kinds = [kind for kind in KINDS if any(cell[0] == kind for cell in cells)]
    phases = [phase for phase in PHASES if any(cell[1] == phase for cell in cells)]
    lines = [["", *phases], ["---"] * (len(phases) + 1)]
    lines += [[kind, *(cells.get((kind, phase), "") for phase in phases)] for kind in kinds]
    told = ", ".join(f"{name} {count}" for name, count in figures["decisions"].items()) or "none"
    failed = figures["failed_seeds"]
    return "\n".join(
        [
            f"{figures['survived']} of {figures['schedules']} schedules kept their promise, in "
            f"{figures['starts']} starts"
            + (f"; seeds that did not: {', '.join(map(str, failed))}." if failed else "."),
            f"Decisions about bad steps: {told}. From a signal to the durable checkpoint and the "
            f"end of the loop: {figures['stops']} times, median {figures['stop_median_s']} s, "
            f"longest {figures['stop_longest_s']} s.",
            f"Processor time of all ranks: {figures['cpu_s']:.0f} s. Seeds: "
            f"{', '.join(map(str, figures['seeds']))}.",
            "",
            "Survived / struck, by kind and phase:",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
        ]
    )


def main(words: list[str]) -> None:
    """Write the figures and the table."""
    given = dict(word.split("=", 1) for word in words)
    lines = Path(given["results"]).read_text().splitlines()
    latest = {record["seed"]: record for record in map(json.loads, lines)}
    figures = summary(list(latest.values()))
    (ROOT / "bench/results/chaos.json").write_text(json.dumps(figures, indent=1) + "\n")
    docs = ROOT / "docs/chaos.md"
    before, _, rest = docs.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    docs.write_text(f"{before}{BEGIN}\n{table_of(figures)}\n{END}{after}")
    sys.stdout.write(table_of(figures) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
