"""The token stream of a run: any row from (seed, weights, global sample index), without state.

A domain is an endless sequence of epochs; in each its documents are shuffled anew and laid end to
end. Row m of a domain covers positions m*s .. m*s + s of that sequence: s tokens and the label of
the last, which is also the first token of row m + 1. No token is lost, none is repeated.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from ring_train.data.batch import Row
from ring_train.data.blend import BlendSchedule
from ring_train.data.shards import Shard


class DomainStream:
    """The epochs of one domain. Caches the document order of the epochs in use."""

    def __init__(self, name: str, shard: Shard, *, seed: int, seq_length: int) -> None:
        self.shard, self.seq_length = shard, seq_length
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        self._key = int.from_bytes(digest[:8], "big")
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def row(self, index: int, domain: int) -> Row:
        """Return row `index` of the stream, labelled with the index of its domain."""
        tokens, starts = self._read(index * self.seq_length, self.seq_length + 1)
        return Row(tokens=tokens, domain=domain, document_starts=starts)

    def num_rows_per_epoch(self) -> int:
        """Return the rows, labels included, that one epoch holds."""
        return (self.shard.num_tokens - 1) // self.seq_length

    def _read(self, start: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens of the endless sequence and where documents begin in them, 0 excluded."""
        pieces, starts, length = [], [], 0
        while length < num_tokens:
            epoch, offset = divmod(start + length, self.shard.num_tokens)
            order, bounds = self._epoch(epoch)
            place = int(np.searchsorted(bounds, offset, side="right")) - 1
            while length < num_tokens and place < len(order):
                begin = int(self.shard.bounds[order[place]]) + offset - int(bounds[place])
                end = int(self.shard.bounds[order[place] + 1])
                piece = self.shard.tokens[begin : min(end, begin + num_tokens - length)]
                if length > 0 and offset == bounds[place]:
                    starts.append(length)
                pieces.append(piece)
                length += len(piece)
                place += 1
                offset = int(bounds[place])
        return np.concatenate(pieces), np.array(starts, dtype=np.int64)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (document order [n], where each begins in the epoch [n + 1])."""
        lengths = np.diff(self.shard.bounds)
        order = np.random.Generator(np.random.Philox(key=[self._key, epoch])).permutation(
            len(lengths)
        )
        bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths[order], out=bounds[1:])
        return order, bounds


class SampleStream:
    """The blended stream of all domains."""

    def __init__(self, streams: Sequence[DomainStream], schedule: BlendSchedule) -> None:
        self.streams, self.schedule = streams, schedule

    def row(self, sample: int) -> Row:
        """Return the row of a global sample index."""
        domain, index = self.schedule.position(sample)
        return self.streams[domain].row(index, domain)


def build_streams(shards: Mapping[str, Shard], *, seed: int, seq_length: int) -> list[DomainStream]:
    """Return a stream per domain in the order of sorted names.

    The order of a domain's documents depends on the seed and its name, not on the other domains.
    """
    return [
        DomainStream(name, shards[name], seed=seed, seq_length=seq_length)
        for name in sorted(shards)
    ]
