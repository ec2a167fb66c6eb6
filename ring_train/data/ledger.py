"""The ledger: how many tokens of each domain each phase has read. Padding is not counted.

The trainer counts what it was given; the plan says what that must be. `prove_mixture` compares.
"""

from collections.abc import Sequence

import numpy as np

from ring_train.data.batch import Batch
from ring_train.plan import Phase

Ledger = dict[str, dict[str, int]]
"""{phase: {domain: tokens}}"""


def count_tokens(micro_batches: Sequence[Batch], num_domains: int) -> np.ndarray:
    """Return [domains] int64 tokens of some micro batches that are on the CPU."""
    counts = np.zeros(num_domains, dtype=np.int64)
    for batch in micro_batches:
        real = batch.domains[~batch.padding_mask].numpy()
        counts += np.bincount(real, minlength=num_domains)
    return counts


def make_ledger(phases: Sequence[Phase], domains: Sequence[str], tokens: np.ndarray) -> Ledger:
    """Return [phases, domains] counts under their names, phases that have not begun left out."""
    return {
        phase.name: {name: int(count) for name, count in zip(domains, counts, strict=True)}
        for phase, counts in zip(phases, tokens, strict=True)
        if counts.any()
    }


def ledger_array(phases: Sequence[Phase], domains: Sequence[str], ledger: Ledger) -> np.ndarray:
    """Return the counts [phases, domains] of a ledger."""
    return np.array(
        [[ledger.get(phase.name, {}).get(name, 0) for name in domains] for phase in phases],
        dtype=np.int64,
    ).reshape(len(phases), len(domains))
