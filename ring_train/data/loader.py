"""Micro batches of a run, for training and validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ring_train.config import Config, DomainConfig, Packing
from ring_train.data.batch import Batch, Row, make_batch
from ring_train.data.errors import DataError
from ring_train.data.index import IndexFolder
from ring_train.data.mixture import Mixture, check_mixture, mixture_record
from ring_train.data.samples import (
    ContiguousStream,
    DomainStream,
    PackedStream,
    Selection,
    read_row,
)
from ring_train.data.shards import Expected, Shard, open_shard
from ring_train.plan import Phase, Plan

VALIDATION_SEED = 0
"""Held-out documents keep one order in every run, so that losses can be compared."""


class Batches:
    """Where a run's tokens come from. Any micro batch can be asked for, in any order."""

    def __init__(
        self, plan: Plan, mixture: Mixture, shards: dict[str, Shard], held_out: HeldOut
    ) -> None:
        self.plan, self.mixture, self.shards, self.held_out = plan, mixture, shards, held_out
        self.domains = tuple(sorted(plan.config.data.domains))

    def batch(self, step: int, micro_batch: int, dp_rank: int) -> Batch:
        """Return one micro batch of the training stream; all arguments count from 0."""
        at, dp = self.plan.at(step), self.plan.mesh.dp
        size = at.phase.batch.micro_batch_size
        first = at.first_sample + (micro_batch * dp + dp_rank) * size
        return _collate(self.plan, (self.mixture.row(first + j) for j in range(size)))

    def validation(self, domain: str, dp_rank: int, step: int = 0) -> list[Batch]:
        """Return this rank's validation micro batches of a domain, the same ones in all a phase.

        Empty if the domain has no held-out shard.

        Args:
            domain: its name.
            dp_rank: data-parallel rank.
            step: decides the phase, and with it the length of the rows.
        """
        return self.held_out.validation(domain, dp_rank, step)

    def validation_pairs(self, domain: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens, next tokens) that the validation loss of a domain averages over."""
        batch = _collate(self.plan, self.held_out.rows(domain, self.plan.phases[-1]))
        mask = batch.loss_mask
        return batch.tokens[mask].numpy(), batch.labels[mask].numpy()

    def training_tokens(self, domain: str) -> np.ndarray:
        """Return the ids of all training documents of a domain, mapped."""
        return self.shards[domain].tokens

    def data_hashes(self) -> dict[str, str]:
        """Return {"DOMAIN.train" or "DOMAIN.valid": SHA-256 of the shard} for the run record."""
        shards = {f"{name}.train": shard for name, shard in self.shards.items()}
        shards |= {f"{name}.valid": s.shard for name, s in self.held_out.streams.items()}
        return {name: shard.sha256 for name, shard in sorted(shards.items())}

    def mixture_record(self) -> list[dict[str, object]]:
        """Return what the samples of each phase depend on."""
        hashes = {name: shard.sha256 for name, shard in self.shards.items()}
        return mixture_record(self.plan, hashes)


class HeldOut:
    """Validation rows: train.eval_steps micro batches of every rank, of each held-out shard."""

    def __init__(self, plan: Plan, streams: dict[str, ContiguousStream]) -> None:
        self.plan, self.streams = plan, streams
        self.domains = tuple(sorted(plan.config.data.domains))

    def validation(self, domain: str, dp_rank: int, step: int = 0) -> list[Batch]:
        """Return the micro batches of a domain, see `Batches.validation`."""
        phase = self.plan.at(step).phase
        size, dp = phase.batch.micro_batch_size, self.plan.mesh.dp
        rows = self.rows(domain, phase)
        firsts = range(dp_rank * size, len(rows), size * dp)
        return [_collate(self.plan, rows[first : first + size]) for first in firsts]

    def rows(self, domain: str, phase: Phase) -> list[Row]:
        """Return the rows of a domain in a phase; none without a held-out shard."""
        if domain not in self.streams:
            return []
        number = sorted(self.plan.config.data.domains).index(domain)
        s = phase.batch.seq_length
        stream = self.streams[domain]
        return [read_row(stream, i * s, s, number) for i in range(self._count(phase))]

    def problems(self) -> list[str]:
        """Return which shards are too short for which phase; none if nothing is evaluated."""
        found = []
        if not self.plan.config.train.eval_interval_steps:
            return found
        for stream in self.streams.values():
            for phase in self.plan.phases:
                rows = (stream.epoch_length - 1) // phase.batch.seq_length
                if rows < self._count(phase):
                    found.append(
                        f"{stream.shard.prefix}.bin has {rows} rows of {phase.batch.seq_length} "
                        f"tokens, fewer than train.eval_steps={self.plan.config.train.eval_steps} "
                        f"* train.micro_batch_size * data-parallel size = {self._count(phase)} of "
                        f"phase {phase.name}; lower eval_steps or hold out more text"
                    )
        return found

    def _count(self, phase: Phase) -> int:
        return self.plan.config.train.eval_steps * phase.batch.micro_batch_size * self.plan.mesh.dp


def build_batches(plan: Plan) -> Batches:
    """Open and check all shards of `plan.config.data` and return the run's batches.

    Document orders and schedules that are not in the index folder yet are built; no process group
    is needed, and processes that start together wait for the one that builds.

    Raises:
        DataError: no domain, a shard that does not fit (see `open_shard`), or a domain that would
            be read more often than it may.
    """
    config = plan.config
    if not config.data.domains:
        raise DataError("data.domains is empty, but training needs one; choose data=NAME")
    expected, index = _expected(config), _index_folder(config)
    shards, streams = {}, {}
    for name in sorted(config.data.domains):
        shards[name] = open_shard(config.data.domains[name].path, expected)
        phases = [phase for phase in plan.phases if phase.shares[name]]
        if phases:
            stream = _build_stream(config, name, shards[name], index, phases[0].batch.seq_length)
            _check_rows(plan, name, stream, phases)
            streams[name] = stream
    mixture = Mixture(plan.phases, streams, index)
    check_mixture(plan, mixture)
    return Batches(plan, mixture, shards, build_held_out(plan))


def build_held_out(plan: Plan) -> HeldOut:
    """Open and check the held-out shards of `plan.config.data` and return their rows.

    Raises:
        DataError: a shard does not fit (see `open_shard`), or is too short for what is evaluated.
    """
    config = plan.config
    expected, index = _expected(config), _index_folder(config)
    held_out = HeldOut(
        plan,
        {
            name: ContiguousStream(
                name,
                open_shard(domain.valid_path, expected),
                index,
                seed=VALIDATION_SEED,
                selection=Selection(),
            )
            for name, domain in sorted(config.data.domains.items())
            if domain.valid_path is not None
        },
    )
    problems = held_out.problems()
    if problems:
        raise DataError("\n".join(problems))
    return held_out


def open_streams(config: Config, seq_lengths: Mapping[str, int]) -> dict[str, DomainStream]:
    """Return the streams of some domains for rows of the given lengths.

    Raises:
        DataError: a shard that does not fit, or of which nothing is selected.
    """
    expected, index = _expected(config), _index_folder(config)
    return {
        name: _build_stream(
            config, name, open_shard(config.data.domains[name].path, expected), index, length
        )
        for name, length in sorted(seq_lengths.items())
    }


def _expected(config: Config) -> Expected:
    return Expected(
        tokenizer=config.data.tokenizer,
        vocab_size=config.model.vocab_size,
        eos_token_id=config.model.eos_token_id,
    )


def _index_folder(config: Config) -> IndexFolder:
    return IndexFolder(Path(config.data.index_dir or Path(config.run_dir) / "index"))


def _collate(plan: Plan, rows: Iterable[Row]) -> Batch:
    config = plan.config
    return make_batch(
        list(rows),
        document_isolation=config.data.document_isolation,
        num_mtp=config.model.mtp_num_layers,
    )


def _check_rows(plan: Plan, name: str, stream: DomainStream, phases: list[Phase]) -> None:
    """Raise a DataError if a domain cannot fill one row of the phases that read it."""
    longest = max(phases, key=lambda phase: phase.batch.seq_length)
    needed = longest.batch.seq_length + 1
    if plan.config.data.packing is Packing.contiguous and stream.epoch_length < needed:
        path = f"phases.{longest.name}" if plan.config.phases else "train"
        raise DataError(
            f"data.domains.{name}: {stream.shard.prefix}.bin has {stream.epoch_length} tokens for "
            f"it, fewer than {path}.seq_length + 1 = {needed}; shorten the rows or give more text"
        )


def _build_stream(
    config: Config, name: str, shard: Shard, index: IndexFolder, seq_length: int
) -> DomainStream:
    domain, packing = config.data.domains[name], config.data.packing
    selection = Selection(domain.min_document_tokens, domain.max_document_tokens)
    _check_selection(name, domain, shard, selection)
    seed = config.seed
    if packing is Packing.contiguous:
        return ContiguousStream(name, shard, index, seed=seed, selection=selection)
    return PackedStream(
        name,
        shard,
        index,
        seed=seed,
        selection=selection,
        seq_length=seq_length,
        cut=packing is Packing.best_fit,
    )


def _check_selection(name: str, domain: DomainConfig, shard: Shard, selection: Selection) -> None:
    """Raise a DataError if no token of a domain is selected."""
    selected = selection.documents(shard.lengths)
    num_tokens = shard.num_tokens if selected is None else shard.lengths[selected].sum()
    if num_tokens == 0:
        raise DataError(
            f"data.domains.{name}: none of {shard.num_documents} documents of {shard.prefix} has "
            f"min_document_tokens={domain.min_document_tokens} to max_document_tokens="
            f"{domain.max_document_tokens} tokens; the longest has {int(shard.lengths.max())}"
        )
