"""Duplicate ids of a finished PREFIX.ids, found in bounded memory."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HASHES_A_PASS = 8_000_000
"""64 MB; a longer file is read several times, each time for a part of the hashes."""


def count_duplicates(path: Path, num_names: int, num_examples: int = 5) -> tuple[int, list[str]]:
    """Return how many lines repeat an earlier line, and some of those lines."""
    num_passes = -(-num_names // HASHES_A_PASS)
    total = 0
    examples: list[str] = []
    for part in range(num_passes):
        hashes = np.fromiter(_hashes(path, part, num_passes), dtype=np.int64)
        hashes.sort()
        repeated = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if not repeated:
            continue
        with path.open("rb") as stream:
            counts = Counter(line for line in stream if hash(line) in repeated)
        total += sum(count - 1 for count in counts.values())
        found = [line.decode().strip() for line, count in counts.items() if count > 1]
        examples += found[: num_examples - len(examples)]
    return total, examples


def _hashes(path: Path, part: int, num_parts: int) -> Iterator[int]:
    with path.open("rb") as stream:
        for line in stream:
            value = hash(line)
            if value % num_parts == part:
                yield value
