"""Hugging Face datasets: folders of save_to_disk, folders load_dataset reads, hub ids streamed.

`datasets` is imported on first use: it takes seconds.
"""

import os
from collections.abc import Iterator
from typing import Any

from data_pipeline.config import PipelineError
from data_pipeline.sources.inputs import DATASET_MARKS, Input
from data_pipeline.sources.records import MESSAGES_KEY, SourceOptions

DEFAULT_SPLIT = "train"
BATCH_ROWS = 64


def read_hub(source: Input, options: SourceOptions, block_bytes: int) -> Iterator[list[Any]]:
    """Yield the rows of a dataset in batches of about `block_bytes` of text."""
    dataset = _open(source.path, options)
    batch: list[Any] = []
    num_bytes = 0
    for columns in dataset.iter(batch_size=BATCH_ROWS):
        values = zip(*columns.values(), strict=True)
        rows = [dict(zip(columns, row, strict=True)) for row in values]
        batch += rows
        num_bytes += sum(_num_bytes(row, options) for row in rows)
        if num_bytes >= block_bytes:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _open(path: str, options: SourceOptions) -> Any:
    """Return the split of a dataset, without images and the like decoded."""
    import datasets

    name, _, split = path.partition(":")
    try:
        if any(os.path.exists(os.path.join(name, mark)) for mark in DATASET_MARKS):
            dataset = datasets.load_from_disk(name)
        else:
            dataset = datasets.load_dataset(name, split=split or DEFAULT_SPLIT, streaming=True)
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"input=hf:{path} cannot be opened ({error}); give a folder of save_to_disk, a folder "
            "of data files, or a hub id NAME:SPLIT that this machine can reach"
        ) from None
    if isinstance(dataset, datasets.DatasetDict):
        wanted = split or DEFAULT_SPLIT
        if wanted not in dataset:
            raise PipelineError(
                f"input=hf:{path} has no split {wanted!r}; "
                f"choose from {', '.join(map(str, dataset))}"
            )
        dataset = dataset[wanted]
    columns = dataset.column_names or []
    if columns and options.messages and MESSAGES_KEY not in columns:
        raise PipelineError(
            f"input=hf:{path} has no column {MESSAGES_KEY!r}; rename the one of "
            f"{', '.join(columns)} that holds conversations"
        )
    if columns and options.text_key not in columns and MESSAGES_KEY not in columns:
        raise PipelineError(
            f"input=hf:{path} has no column {options.text_key!r}; "
            f"give text_key=NAME, one of {', '.join(columns)}"
        )
    return dataset


def _num_bytes(row: dict[str, Any], options: SourceOptions) -> int:
    """Return about how long the text of a row is."""
    if options.messages:
        return len(repr(row.get(MESSAGES_KEY)))
    return len(row.get(options.text_key) or "")
