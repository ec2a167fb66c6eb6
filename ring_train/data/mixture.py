"""The sample stream of a run: any row from (seed, plan, global sample index), without state.

A phase takes its samples from the domains in the order of its blend schedule; each domain goes on
in the next phase where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ring_train.data.batch import Row
from ring_train.data.blend import (
    BLOCK_SAMPLES,
    BlendSchedule,
    block_states,
    num_block_states,
    reduced_shares,
)
from ring_train.data.errors import DataError
from ring_train.data.index import IndexFolder
from ring_train.data.samples import DomainStream, read_row
from ring_train.plan import Phase, Plan


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a sample comes from."""

    phase: Phase
    domain: int
    """Index into the sorted domain names."""
    position: int
    """In the domain's stream."""


class Mixture:
    """The blended stream of all domains through all phases.

    Args:
        phases: of the plan.
        streams: per domain, in the order of the plan's shares; one that no phase reads may lack.
        index: where schedules are kept.
    """

    def __init__(
        self, phases: Sequence[Phase], streams: Mapping[str, DomainStream], index: IndexFolder
    ) -> None:
        self.phases = tuple(phases)
        self.domains = tuple(phases[0].shares)
        self.streams = streams
        self._schedules = [open_schedule(phase, index) for phase in phases]
        self.starts = self._phase_starts()

    def place(self, sample: int) -> Place:
        """Return where a global sample index comes from."""
        number = self._phase_of(sample)
        phase = self.phases[number]
        domain, index = self._schedules[number].position(sample - phase.first_sample)
        step = self.streams[self.domains[domain]].step(phase.batch.seq_length)
        return Place(phase, domain, int(self.starts[number, domain]) + index * step)

    def row(self, sample: int) -> Row:
        """Return the row of a global sample index."""
        place = self.place(sample)
        stream = self.streams[self.domains[place.domain]]
        return read_row(stream, place.position, place.phase.batch.seq_length, place.domain)

    def rows_before(self, sample: int) -> np.ndarray:
        """Return [phases, domains] int64: rows among the first `sample` samples."""
        counts = np.zeros((len(self.phases), len(self.domains)), dtype=np.int64)
        for number, phase in enumerate(self.phases):
            inside = min(max(0, sample - phase.first_sample), phase.num_samples)
            counts[number] = self._schedules[number].counts(inside)
        return counts

    def tokens_before(self, sample: int) -> np.ndarray:
        """Return [phases, domains] int64: tokens of the first `sample` samples, no padding."""
        tokens = np.zeros((len(self.phases), len(self.domains)), dtype=np.int64)
        rows = self.rows_before(sample)
        for number, phase in enumerate(self.phases):
            for domain in np.flatnonzero(rows[number]).tolist():
                tokens[number, domain] = self.streams[self.domains[domain]].num_tokens(
                    int(self.starts[number, domain]),
                    int(rows[number, domain]),
                    phase.batch.seq_length,
                )
        return tokens

    def epochs(self) -> dict[str, float]:
        """Return how often the run reads each domain."""
        ends = self.starts[-1]
        return {
            name: int(end) / self.streams[name].epoch_length
            for name, end in zip(self.domains, ends, strict=True)
            if name in self.streams
        }

    def _phase_of(self, sample: int) -> int:
        firsts = [phase.first_sample for phase in self.phases]
        return int(np.searchsorted(firsts, sample, side="right")) - 1

    def _phase_starts(self) -> np.ndarray:
        """Return [phases + 1, domains] int64: each domain's position at the start of each phase."""
        starts = np.zeros((len(self.phases) + 1, len(self.domains)), dtype=np.int64)
        for number, (phase, schedule) in enumerate(zip(self.phases, self._schedules, strict=True)):
            counts = schedule.counts(phase.num_samples)
            for domain, name in enumerate(self.domains):
                step = self.streams[name].step(phase.batch.seq_length) if counts[domain] else 0
                starts[number + 1, domain] = starts[number, domain] + int(counts[domain]) * step
        return starts


def open_schedule(phase: Phase, index: IndexFolder) -> BlendSchedule:
    """Return the schedule of a phase; a long one is computed once and mapped from then on."""
    shares = list(phase.shares.values())
    num_blocks = num_block_states(shares, phase.num_samples)
    states = index.array(
        "blend",
        {"shares": list(reduced_shares(shares)), "blocks": num_blocks},
        functools.partial(block_states, shares, phase.num_samples),
        num_blocks * BLOCK_SAMPLES,
    )
    return BlendSchedule(shares, phase.num_samples, states)


def mixture_problems(plan: Plan, mixture: Mixture) -> list[str]:
    """Return which domains are read more often, or further, than they may be."""
    problems = []
    epochs = mixture.epochs()
    num_samples = sum(phase.num_samples for phase in plan.phases)
    read_tokens = mixture.tokens_before(num_samples).sum(0)
    for number, name in enumerate(mixture.domains):
        config = plan.config.data.domains[name]
        tokens = int(read_tokens[number])
        if config.max_epochs is not None and epochs.get(name, 0.0) > config.max_epochs:
            problems.append(
                f"data.domains.{name}.max_epochs={config.max_epochs:g}, but the run would read the "
                f"domain {epochs[name]:.3f} times ({tokens} tokens); lower its share or budget, "
                "add text, or raise max_epochs"
            )
        if config.max_tokens is not None and tokens > config.max_tokens:
            problems.append(
                f"data.domains.{name}.max_tokens={config.max_tokens}, but the run would read "
                f"{tokens} tokens of it; lower its share or budget, or raise max_tokens"
            )
    return problems


def check_mixture(plan: Plan, mixture: Mixture) -> None:
    """Raise a DataError with every domain that is read too often."""
    problems = mixture_problems(plan, mixture)
    if problems:
        raise DataError("\n".join(problems))


def mixture_record(plan: Plan, shards: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return per phase what its samples depend on, so that a resumed run can be compared.

    Args:
        plan: the plan.
        shards: hash of each domain's shard.
    """
    data = plan.config.data
    return [
        {
            "name": phase.name,
            "seed": plan.config.seed,
            "packing": data.packing.value,
            "first_sample": phase.first_sample,
            "num_samples": phase.num_samples,
            "seq_length": phase.batch.seq_length,
            "ramp": [list(stage) for stage in phase.ramp],
            "domains": {
                name: {
                    "share": share,
                    "shard": shards[name],
                    "min_document_tokens": data.domains[name].min_document_tokens,
                    "max_document_tokens": data.domains[name].max_document_tokens,
                }
                for name, share in phase.shares.items()
                if share
            },
        }
        for phase in plan.phases
    ]


def check_same_samples(
    before: list[dict[str, Any]], now: list[dict[str, Any]], num_samples: int
) -> None:
    """Raise a DataError if the first `num_samples` samples of two mixture records differ.

    What lies ahead may be planned anew: later phases freely, new domains among them, and the length
    of the phase that the run is in as long as its shares stay.
    """
    for old, new in itertools.zip_longest(before, now):
        if old is None or old["first_sample"] >= num_samples:
            return
        was, is_now = (_read_part(record, num_samples) for record in (old, new or {}))
        changed = [
            f"{key}={is_now.get(key)} (was {was.get(key)})"
            for key in sorted(was.keys() | is_now.keys())
            if was.get(key) != is_now.get(key)
        ]
        if changed:
            raise DataError(
                f"the run has read {num_samples} samples, among them of phase {old['name']!r}, of "
                f"which these changed: {'; '.join(changed)}; restore them, and plan changes in "
                "later phases only"
            )


def _read_part(record: dict[str, Any], num_samples: int) -> dict[str, Any]:
    """Return what the samples below `num_samples` of a phase depend on, under dotted keys."""
    if not record:
        return {}
    keys = ("name", "seed", "packing", "first_sample", "seq_length")
    plain = {key: record.get(key) for key in keys}  # another version may lack one
    read = min(record["num_samples"], num_samples - record["first_sample"])
    domains = {
        f"domains.{name}.{key}": value
        for name, domain in record.get("domains", {}).items()
        for key, value in domain.items()
    }
    stages = [stage for stage in record["ramp"] if stage[1] < num_samples]
    return {**plain, "samples read": read, "batch sizes": stages, **domains}
