"""The table of faults in docs/export.md."""

from collections.abc import Sequence
from pathlib import Path

HEAD = "## Faults that are named"


def write_mutants(path: Path, rows: Sequence[tuple[str, list[str]]]) -> None:
    """Write the table of faults and of the checks that failed, the page above left as it is."""
    page, _, _ = path.read_text(encoding="ascii").partition(HEAD)
    caught = sum(bool(checks) for _, checks in rows)
    lines = [
        f"{HEAD}\n",
        "Each was put into a right folder (`tests/exports/mutants.py`); checks that failed are on "
        f"the right. {caught} of {len(rows)} are named.\n",
        "| fault | checks that fail |",
        "|---|---|",
    ]
    lines += [f"| {fault} | {', '.join(checks)} |" for fault, checks in rows]
    path.write_text(page + "\n".join(lines) + "\n", encoding="ascii")
