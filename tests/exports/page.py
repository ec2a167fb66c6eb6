"""The table of faults in docs/export.md."""

from collections.abc import Sequence
from pathlib import Path

HEAD = "## Faults that are named"


WAYS = (
    *("transformers_one_pass", "transformers_token_by_token", "transformers_prefill_in_pieces"),
    *("transformers_padded_batch", "trainer_generation"),
)
"""Checks of log-probabilities without vLLM."""


def summary(checks: list[str]) -> str:
    """Return the names of failed checks, all of WAYS as one."""
    if set(WAYS) <= set(checks):
        checks = [*(name for name in checks if name not in WAYS), "log-probabilities"]
    return ", ".join(f"`{name}`" for name in checks)


def write_mutants(path: Path, rows: Sequence[tuple[str, list[str]]]) -> None:
    """Write the table of faults and of the checks that failed, the page above left as it is."""
    page, _, _ = path.read_text(encoding="ascii").partition(HEAD)
    caught = sum(bool(checks) for _, checks in rows)
    lines = [
        f"{HEAD}\n",
        "Each was put into a right folder (`tests/exports/mutants.py`); checks that failed are on "
        f"the right, `log-probabilities` for all ways to get them. {caught} of {len(rows)} are "
        "named.\n",
        "| fault | checks that fail |",
        "|---|---|",
    ]
    lines += [f"| {fault} | {summary(checks)} |" for fault, checks in rows]
    path.write_text(page + "\n".join(lines) + "\n", encoding="ascii")
