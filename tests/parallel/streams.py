"""A synthetic token stream for rank tests: structured documents, a pure function of the index."""

import torch

from ring_train.data.batch import Batch, pack_documents
from ring_train.plan import Plan


def make_micro_batches(
    plan: Plan, step: int, dp_rank: int, *, pad_to_multiple: int = 1
) -> list[Batch]:
    """Return the micro batches of one data-parallel rank, by global sample index."""
    shape, dp = plan.batch, plan.mesh.dp
    batches = []
    for index in range(shape.num_micro_batches):
        first = step * shape.global_batch_size + (index * dp + dp_rank) * shape.micro_batch_size
        rows = range(first, first + shape.micro_batch_size)
        documents = [part for row in rows for part in documents_of(row, shape.seq_length)]
        batches.append(
            pack_documents(documents, num_mtp=plan.layers.num_mtp, pad_to_multiple=pad_to_multiple)
        )
    return batches


def documents_of(row: int, length: int) -> list[list[int]]:
    """Return two documents of arithmetic progressions that fill a row, cut at an odd place."""
    generator = torch.Generator().manual_seed(row)
    cut = int(torch.randint(3, length - 3, (), generator=generator))
    documents = []
    for size in (cut, length - cut):
        start, stride = torch.randint(1, 9, (2,), generator=generator).tolist()
        documents.append([(start * 7 + stride * 3 * i) % 97 for i in range(size)])
    return documents
