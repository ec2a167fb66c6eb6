"""The count of a curation: what came in is what was kept plus every drop, exactly."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from data_pipeline.config import PipelineError


class Tally:
    """Documents and characters under tuples of names, such as ("dropped", step, reason, domain)."""

    def __init__(self) -> None:
        self.documents: Counter[tuple[str, ...]] = Counter()
        self.characters: Counter[tuple[str, ...]] = Counter()

    def add(self, key: tuple[str, ...], characters: int, documents: int = 1) -> None:
        """Count documents that have this many characters together."""
        self.documents[key] += documents
        self.characters[key] += characters

    def merge(self, other: "Tally") -> None:
        """Add what another tally counted."""
        self.documents.update(other.documents)
        self.characters.update(other.characters)

    def total(self, *prefix: str) -> tuple[int, int]:
        """Return (documents, characters) under all keys that begin with the names."""
        keys = [key for key in self.documents if key[: len(prefix)] == prefix]
        return sum(self.documents[k] for k in keys), sum(self.characters[k] for k in keys)

    def by_domain(self, kind: str) -> dict[str, tuple[int, int]]:
        """Return domain -> (documents, characters) of a kind; the domain is a key's last name."""
        sums: dict[str, tuple[int, int]] = {}
        for key, documents in self.documents.items():
            if key[0] == kind:
                before = sums.get(key[-1], (0, 0))
                sums[key[-1]] = (before[0] + documents, before[1] + self.characters[key])
        return sums

    def to_json(self) -> list[list[Any]]:
        """Return rows [name, ..., documents, characters] in a fixed order."""
        return [[*k, self.documents[k], self.characters[k]] for k in sorted(self.documents)]

    @classmethod
    def from_json(cls, rows: list[list[Any]]) -> "Tally":
        """Return the tally that `to_json` wrote."""
        tally = cls()
        for *names, documents, characters in rows:
            tally.add(tuple(names), characters, documents)
        return tally


def check_conservation(tally: Tally) -> None:
    """Check that each domain's documents and characters are all accounted for.

    Characters that an edit removed count under "edited" (negative where it added some).

    Raises:
        PipelineError: something was lost or came from nowhere; a bug, the output is not finished.
    """
    read, kept = tally.by_domain("read"), tally.by_domain("kept")
    dropped, edited = tally.by_domain("dropped"), tally.by_domain("edited")
    for domain in sorted(read.keys() | kept.keys() | dropped.keys() | edited.keys()):
        documents = _at(kept, domain)[0] + _at(dropped, domain)[0]
        characters = sum(_at(part, domain)[1] for part in (kept, dropped, edited))
        if (documents, characters) != _at(read, domain):
            raise PipelineError(
                f"domain {domain!r}: {_at(read, domain)} (documents, characters) were read but "
                f"{(documents, characters)} are kept, dropped or edited away; nothing was "
                "published, please report this"
            )


def _at(sums: Mapping[str, tuple[int, int]], domain: str) -> tuple[int, int]:
    return sums.get(domain, (0, 0))
