"""One block of a source of conversations to token ids and a loss mask: what a worker does."""

import dataclasses
from collections import Counter

import numpy as np
import orjson

from data_pipeline.chat.encoder import ChatEncoder, Sample
from data_pipeline.chat.options import ChatFault, ChatOptions
from data_pipeline.sources import Block, Fault, Row, read_block
from data_pipeline.tokenization.encode_block import EncodedBlock, Encoding, Name


@dataclasses.dataclass(slots=True)
class _Kept:
    """The samples of a block so far."""

    samples: list[Sample] = dataclasses.field(default_factory=list)
    names: list[Name] = dataclasses.field(default_factory=list)
    faults: list[Fault] = dataclasses.field(default_factory=list)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)


def encode_chat_block(
    block: Block, _: int, encoder: ChatEncoder, encoding: Encoding
) -> EncodedBlock:
    """Return the encoded conversations of a block."""
    assert encoding.chat is not None
    items, num_rows = read_block(block, encoding.options)
    kept = _Kept()
    for item in items:
        if isinstance(item, Fault):
            kept.faults.append(item)
            continue
        try:
            samples = encoder.encode(item.record)
        except ChatFault as fault:
            kept.faults.append(Fault(fault.reason, item.number, fault.detail))
        else:
            _keep(kept, item, samples, encoding.chat)
    tokens = np.array([id_ for s in kept.samples for id_ in s.ids], dtype=encoding.dtype)
    mask = np.array([trained for s in kept.samples for trained in s.trained], dtype=np.bool_)
    kept.counts["trained_tokens"] = int(mask.sum())
    return EncodedBlock(
        num_rows=num_rows,
        faults=kept.faults,
        names=kept.names,
        lengths=np.array([len(sample.ids) for sample in kept.samples], dtype=np.int32),
        max_token_id=int(tokens.max()) if len(tokens) else 0,
        num_characters=0,
        probes=[],
        tokens=tokens,
        mask=mask.tobytes(),
        chat=dict(kept.counts),
    )


def _keep(kept: _Kept, row: Row, samples: list[Sample], options: ChatOptions) -> None:
    """Take the samples of a row that are not too long."""
    kept.counts["conversations"] += 1
    kept.counts["split_conversations"] += samples[0].turn is not None
    for sample in samples:
        if options.max_tokens and len(sample.ids) > options.max_tokens:
            kept.faults.append(_too_long(sample, row.number, options))
            continue
        kept.samples.append(sample)
        kept.names.append(_name(row, sample))
        kept.counts["trained_turns"] += sample.num_turns


def _name(row: Row, sample: Sample) -> Name:
    suffix = "" if sample.turn is None else f"#{sample.turn}"
    return (row.number, suffix) if row.id is None else orjson.dumps(row.id + suffix)


def _too_long(sample: Sample, number: int, options: ChatOptions) -> Fault:
    reason = "dropped_long" if options.on_long == "drop" else "long"
    part = "" if sample.turn is None else f"the turn of message {sample.turn}, "
    detail = f"is {part}{len(sample.ids)} tokens long, more than max_tokens={options.max_tokens}"
    return Fault(reason, number, f"{detail}; on_long=drop counts and drops such samples")
