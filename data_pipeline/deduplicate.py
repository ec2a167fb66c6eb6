"""Exact and near-duplicate removal over a corpus that fits in memory.

A text is reduced to the set of hashes of its long lines. One that was already covered for the most
part by the texts before it is a near-duplicate; covered entirely, by whatever mixture, a duplicate.
"""

import hashlib

MIN_LINE_CHARACTERS = 20
"""Shorter lines (`return self`, `Args:`) say nothing about where a text came from."""
MAX_SEEN_FRACTION = 0.5
"""A text with a larger fraction of its lines seen before is dropped."""


class Deduplicator:
    """Remembers the lines of every text it kept; show it the held-out split first."""

    def __init__(self) -> None:
        self._texts: set[bytes] = set()
        self._lines: set[bytes] = set()

    def drop_reason(self, text: str) -> str | None:
        """Return why a text must be dropped, or None, and then its lines count as seen."""
        lines = {" ".join(line.split()) for line in text.split("\n")}
        whole = _hash("\n".join(sorted(lines)))
        if whole in self._texts:
            return "duplicate"
        hashes = {_hash(line) for line in lines if len(line) >= MIN_LINE_CHARACTERS}
        num_seen = len(hashes & self._lines)
        if num_seen > MAX_SEEN_FRACTION * len(hashes):
            return "near_duplicate"
        self._texts.add(whole)
        self._lines |= hashes
        return None


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
