"""Sources: what a user types becomes inputs, inputs become blocks, blocks become documents."""

from collections.abc import Iterator

from data_pipeline.documents import Document
from data_pipeline.sources.blocks import Block, plan_blocks, read_block
from data_pipeline.sources.inputs import Input, find_inputs
from data_pipeline.sources.records import (
    MEBIBYTE,
    Fault,
    FaultTally,
    Row,
    SourceOptions,
    document_of,
    name_of,
)

__all__ = [
    "Block",
    "Fault",
    "FaultTally",
    "Input",
    "Row",
    "SourceOptions",
    "document_of",
    "find_inputs",
    "name_of",
    "plan_blocks",
    "read_block",
    "read_source",
]

BLOCK_BYTES = 4 * MEBIBYTE


def read_source(
    source: str, options: SourceOptions | None = None, tally: FaultTally | None = None
) -> Iterator[Document]:
    """Yield the documents of a source (grammar: data_pipeline.sources.inputs) in order.

    Empty documents are counted and left out. Memory is bounded by the longest document.

    Args:
        source: what the user typed.
        options: keys, default domain, what to do with faults.
        tally: counts what was left out, by reason; read it when the iterator is exhausted.

    Raises:
        PipelineError: the source matches nothing, or (on_error=refuse) holds a fault.
    """
    options = options or SourceOptions()
    tally = tally or FaultTally(options)
    for part in find_inputs(source):
        num_read = 0
        for block in plan_blocks(part, options, BLOCK_BYTES):
            items, count = read_block(block, options)
            for item in items:
                if isinstance(item, Fault):
                    tally.add(item, f"{part.path}:{num_read + item.number}")
                elif not item.text and not item.record.get("messages"):
                    tally.add(Fault("empty", item.number, ""), "")
                else:
                    name = name_of(item, part.name, num_read)
                    yield document_of(item, name, options, part.stem)
            num_read += count
