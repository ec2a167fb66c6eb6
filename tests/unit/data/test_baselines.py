"""Unigram and bigram losses against counting by hand."""

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ring_train.data import baselines
from ring_train.data.baselines import bigram_nats, measure_baselines, unigram_nats
from ring_train.data.loader import build_batches
from tests.unit.data.shard_files import make_data_plan

TRAINING = np.array([1, 2, 3, 1, 2, 1, 2, 3, 3, 0], dtype=np.uint16)
SOURCES, TARGETS = np.array([1, 1, 2, 4]), np.array([2, 3, 1, 2])
V = 5


def test_losses_equal_the_formulas() -> None:
    m = baselines.BIGRAM_PSEUDO_COUNTS
    stream = TRAINING.tolist()
    single, pairs = Counter(stream), Counter(itertools.pairwise(stream))
    before = Counter(stream[:-1])

    def p1(y: int) -> float:
        return (single[y] + 1) / (len(stream) + V)

    def p2(x: int, y: int) -> float:
        return (pairs[x, y] + m * p1(y)) / (before[x] + m)

    unigram = -sum(math.log(p1(y)) for y in TARGETS.tolist()) / 4
    bigram = -sum(
        math.log(p2(x, y)) for x, y in zip(SOURCES.tolist(), TARGETS.tolist(), strict=True)
    )
    assert unigram_nats(TRAINING, TARGETS, vocab_size=V) == pytest.approx(unigram)
    assert bigram_nats(TRAINING, SOURCES, TARGETS, vocab_size=V) == pytest.approx(bigram / 4)


def test_probabilities_sum_to_one() -> None:
    every = np.arange(V)
    for source in range(V):
        losses = [
            bigram_nats(TRAINING, np.array([source]), np.array([y]), vocab_size=V) for y in every
        ]
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1)


def test_a_bigram_knows_a_cycle_and_a_unigram_does_not() -> None:
    cycle = np.tile(np.arange(V), 4000)
    assert bigram_nats(cycle, cycle[:-1], cycle[1:], vocab_size=V) < 0.1
    assert unigram_nats(cycle, cycle[1:], vocab_size=V) == pytest.approx(math.log(V), abs=1e-3)


def test_baselines_are_measured_on_the_validation_targets(tmp_path: Path) -> None:
    batches = build_batches(make_data_plan(tmp_path))
    measured = measure_baselines(batches, "code")
    assert measured.num_targets == sum(
        int(b.loss_mask.sum()) for b in batches.validation("code", 0)
    )
    assert 5 < measured.bigram_nats < 7
    assert 5 < measured.unigram_nats < 7
