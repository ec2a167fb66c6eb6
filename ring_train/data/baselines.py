"""What counting alone reaches on the validation tokens: unigram and bigram losses, numpy only.

Both are fitted on all training tokens of a domain and judged on the same (token, next token) pairs
as the validation loss.

- unigram: p1(y) = (c(y) + 1) / (N + v), add-one smoothing.
- bigram: p2(y | x) = (c(x, y) + m * p1(y)) / (c(x) + m), backing off to the unigram with the weight
  of m pseudo-counts (a Dirichlet prior).
"""

import dataclasses

import numpy as np

from ring_train.data.loader import Batches

BIGRAM_PSEUDO_COUNTS = 256.0
"""m above: the best power of two for code and prose of the demo, so the baseline is not weak."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baselines:
    """Mean losses of one domain."""

    unigram_nats: float
    bigram_nats: float
    num_targets: int
    """Held-out tokens judged."""


def measure_baselines(batches: Batches, domain: str) -> Baselines:
    """Return the baselines of a domain that has a held-out shard, on its validation targets."""
    training = np.asarray(batches.training_tokens(domain))
    sources, targets = batches.validation_pairs(domain)
    vocab_size = batches.plan.config.model.vocab_size
    return Baselines(
        unigram_nats=unigram_nats(training, targets, vocab_size=vocab_size),
        bigram_nats=bigram_nats(training, sources, targets, vocab_size=vocab_size),
        num_targets=len(targets),
    )


def unigram_nats(training: np.ndarray, targets: np.ndarray, *, vocab_size: int) -> float:
    """Return the mean -ln p1 of the targets.

    Args:
        training: [n] ids of the training stream.
        targets: ids to judge, at least one.
        vocab_size: v; ids are below it.
    """
    return float(-np.log(_unigram(training, vocab_size)[targets]).mean())


def bigram_nats(
    training: np.ndarray, sources: np.ndarray, targets: np.ndarray, *, vocab_size: int
) -> float:
    """Return the mean -ln p2 of the targets given the tokens before them.

    Args:
        training: [n] ids of the training stream.
        sources: the token before each target.
        targets: ids to judge, at least one.
        vocab_size: v; ids are below it.
    """
    stream = training.astype(np.int64)
    pairs, counts = np.unique(stream[:-1] * vocab_size + stream[1:], return_counts=True)
    wanted = sources.astype(np.int64) * vocab_size + targets
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    pair_counts = np.where(pairs[place] == wanted, counts[place], 0)
    source_counts = np.bincount(stream[:-1], minlength=vocab_size)[sources]
    prior = BIGRAM_PSEUDO_COUNTS * _unigram(training, vocab_size)[targets]
    return float(-np.log((pair_counts + prior) / (source_counts + BIGRAM_PSEUDO_COUNTS)).mean())


def _unigram(training: np.ndarray, vocab_size: int) -> np.ndarray:
    counts = np.bincount(training, minlength=vocab_size)
    return (counts + 1.0) / (counts.sum() + vocab_size)
