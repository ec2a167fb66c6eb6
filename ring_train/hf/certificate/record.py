"""What a certificate says: one entry for each thing that was compared, or why it was not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ring_train.errors import UserError
from ring_train.hf.errors import HfError

CERTIFICATE = "certificate.json"
FORMAT_VERSION = 1
MAX_NAMED = 8
"""Differences of one check that are named; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was compared."""

    name: str
    differences: list[str] = field(default_factory=list)
    """Each names what differs, what it is and what it should be; empty if nothing does."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What was measured."""
    not_run: str | None = None
    """Why nothing was compared; None if it was."""
    is_open: bool = False
    """Not run, and without it the folder is not certified."""

    @property
    def status(self) -> str:
        """passed, failed or not run."""
        if self.differences:
            return "failed"
        return "passed" if self.not_run is None else "not run"

    def record(self) -> dict[str, Any]:
        """Return the entry of the certificate."""
        record: dict[str, Any] = {"status": self.status, **self.figures}
        if self.not_run is not None:
            record["reason"] = self.not_run
        if self.differences:
            record["differences"] = named(self.differences)
        return record

    def lines(self) -> Iterable[str]:
        """Yield what a person reads of it."""
        reason = f" ({self.not_run})" if self.not_run is not None else ""
        figures = ", ".join(
            f"{key}={value:.2g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in self.figures.items()
            if isinstance(value, (int, float, str))
        )
        yield f"{self.status:8} {self.name}{reason}{': ' if figures else ''}{figures}\n"
        for difference in named(self.differences):
            yield f"         {difference}\n"


def named(differences: list[str]) -> list[str]:
    """Return the first differences and how many more there are."""
    more = len(differences) - MAX_NAMED
    return differences[:MAX_NAMED] + ([f"and {more} more"] if more > 0 else [])


def run_check(name: str, compare: Callable[[], tuple[list[str], dict[str, Any]]]) -> Check:
    """Return the check that `compare` makes; what it refuses to read is a difference."""
    try:
        differences, figures = compare()
    except HfError as error:
        return Check(name=name, differences=[str(error)])
    return Check(name=name, differences=differences, figures=figures)


def write_certificate(folder: Path, certificate: dict[str, Any]) -> Path:
    """Write the certificate into its folder, whole or not at all.

    Raises:
        UserError: the folder cannot be written to.
    """
    path = folder / CERTIFICATE
    partial = folder / f".{CERTIFICATE}.partial-{os.getpid()}"
    try:
        partial.write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error}); copy the folder to where you may write"
        ) from None
    return path
