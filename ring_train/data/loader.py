"""Micro batches of a run, for training and validation."""

from collections.abc import Iterable

import numpy as np

from ring_train.data.batch import Batch, Row, make_batch
from ring_train.data.blend import make_schedule
from ring_train.data.errors import DataError
from ring_train.data.samples import DomainStream, SampleStream, build_streams
from ring_train.data.shards import Expected, Shard, open_shard
from ring_train.plan import Plan

VALIDATION_SEED = 0
"""Held-out documents keep one order in every run, so that losses can be compared."""


class Batches:
    """Where a run's tokens come from. Any micro batch can be asked for, in any order."""

    def __init__(
        self, plan: Plan, samples: SampleStream, validation: dict[str, DomainStream]
    ) -> None:
        self.plan, self.samples = plan, samples
        self._validation = validation
        self.domains = tuple(sorted(plan.config.data.domains))

    def batch(self, step: int, micro_batch: int, dp_rank: int) -> Batch:
        """Return one micro batch of the training stream; all arguments count from 0."""
        sizes, dp = self.plan.batch, self.plan.mesh.dp
        first = (
            step * sizes.global_batch_size + (micro_batch * dp + dp_rank) * sizes.micro_batch_size
        )
        return self._make(self.samples.row(first + j) for j in range(sizes.micro_batch_size))

    def validation(self, domain: str, dp_rank: int) -> list[Batch]:
        """Return this rank's validation micro batches of a domain: the same ones at every call.

        Empty if the domain has no held-out shard.
        """
        if domain not in self._validation:
            return []
        size, dp = self.plan.batch.micro_batch_size, self.plan.mesh.dp
        rows = self._validation_rows(domain)
        firsts = range(dp_rank * size, len(rows), size * dp)
        return [self._make(rows[first : first + size]) for first in firsts]

    def validation_pairs(self, domain: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens, next tokens) that the validation loss of a domain averages over."""
        batch = self._make(self._validation_rows(domain))
        mask = batch.loss_mask
        return batch.tokens[mask].numpy(), batch.labels[mask].numpy()

    def training_tokens(self, domain: str) -> np.ndarray:
        """Return the ids of all training documents of a domain, mapped."""
        return self.samples.streams[self.domains.index(domain)].shard.tokens

    def data_hashes(self) -> dict[str, str]:
        """Return {"DOMAIN.train" or "DOMAIN.valid": SHA-256 of the shard} for the run record."""
        training = dict(zip(self.domains, self.samples.streams, strict=True))
        shards = {f"{name}.train": stream.shard for name, stream in training.items()}
        shards |= {f"{name}.valid": stream.shard for name, stream in self._validation.items()}
        return {name: shard.sha256 for name, shard in sorted(shards.items())}

    def _validation_rows(self, domain: str) -> list[Row]:
        """Return the held-out rows of a domain: train.eval_steps micro batches for every rank."""
        count = _num_validation_rows(self.plan)
        index = self.domains.index(domain)
        return [self._validation[domain].row(number, index) for number in range(count)]

    def _make(self, rows: Iterable[Row]) -> Batch:
        config = self.plan.config
        return make_batch(
            list(rows),
            document_isolation=config.data.document_isolation,
            num_mtp=config.model.mtp_num_layers,
        )


def build_batches(plan: Plan) -> Batches:
    """Open and check all shards of `plan.config.data` and return the run's batches.

    Raises:
        DataError: no domain, or a shard that does not fit (see `open_shard`).
    """
    config = plan.config
    if not config.data.domains:
        raise DataError("data.domains is empty, but training needs one; choose data=NAME")
    expected = Expected(
        tokenizer=config.data.tokenizer,
        vocab_size=config.model.vocab_size,
        eos_token_id=config.model.eos_token_id,
        seq_length=plan.batch.seq_length,
    )
    names = sorted(config.data.domains)
    shards = {name: open_shard(config.data.domains[name].path, expected) for name in names}
    streams = build_streams(shards, seed=config.seed, seq_length=plan.batch.seq_length)
    schedule = make_schedule(
        [config.data.domains[name].weight for name in names],
        config.train.num_steps * plan.batch.global_batch_size,
    )
    validation = _open_validation(plan, expected)
    return Batches(plan, SampleStream(streams, schedule), validation)


def _open_validation(plan: Plan, expected: Expected) -> dict[str, DomainStream]:
    shards: dict[str, Shard] = {
        name: open_shard(domain.valid_path, expected)
        for name, domain in plan.config.data.domains.items()
        if domain.valid_path is not None
    }
    streams = build_streams(shards, seed=VALIDATION_SEED, seq_length=plan.batch.seq_length)
    count = _num_validation_rows(plan)
    for stream in streams:
        if stream.num_rows_per_epoch() < count:
            raise DataError(
                f"{stream.shard.prefix}.bin has {stream.num_rows_per_epoch()} rows, fewer than "
                f"train.eval_steps={plan.config.train.eval_steps} * train.micro_batch_size * "
                f"data-parallel size = {count}; lower eval_steps or hold out more text"
            )
    return dict(zip(sorted(shards), streams, strict=True))


def _num_validation_rows(plan: Plan) -> int:
    return plan.config.train.eval_steps * plan.batch.micro_batch_size * plan.mesh.dp
