"""Exact and near duplicates by datatrove: signatures of blocks, then a search over all of them.

datatrove's last stage, which drops by position, is ours: it counts and writes out what it drops.
"""

import contextlib
import io
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Executor

import numpy as np
from datatrove.data import Document as DatatroveDocument
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupSignature,
    ExactFindDedups,
)
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.text import TextNormConfig

from data_pipeline.config import PipelineError
from data_pipeline.curation.nodes import ExactDedup, NearDedup, Step
from data_pipeline.curation.rules import text_of
from data_pipeline.curation.stages import REMOVALS_DTYPE, Stage
from data_pipeline.curation.words import HASH_CONFIG, word_tokenizer
from data_pipeline.documents import Document

MAX_BLOCKS = 65534
"""datatrove keeps a document's priority in 16 bits; ours is the block, so that the first wins."""
SHINGLES_AT_ONCE = 4096
"""Bounds the memory of one document's signature to a few MB."""
REASONS: dict[type[Step], str] = {ExactDedup: "duplicate", NearDedup: "near_duplicate"}


class BoundedSignature(MinhashDedupSignature):
    """datatrove's signatures, with the minimum taken over parts of a long document."""

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """Return the minima of the hashes of all shingles, per bucket."""
        parts = [
            super(BoundedSignature, self).get_signature(shingles[start : start + SHINGLES_AT_ONCE])
            for start in range(0, len(shingles), SHINGLES_AT_ONCE)
        ]
        return np.min(np.array(parts, dtype=np.uint64), axis=0).tolist()


def write_signatures(step: Step, stage: Stage, block: int, documents: Iterable[Document]) -> None:
    """Read the documents to their end and write the signatures of those the step looks at."""
    domains = frozenset(step.domains)
    shown = (
        DatatroveDocument(text_of(document), document.id)
        for document in documents
        if not domains or document.domain in domains
    )
    folder = str(stage.signatures)
    if isinstance(step, NearDedup):
        words = word_tokenizer(step.language)
        config = _minhash_config(step)
        # datatrove takes a tokenizer where it takes a language.
        BoundedSignature(folder, config, language=words).run(shown, block)  # type: ignore[arg-type]
    else:
        config = _exact_config(lambda _: MAX_BLOCKS - block)
        ExactDedupSignature(folder, config).run(shown, block)


def find_duplicates(step: Step, stage: Stage, pool: Executor) -> None:
    """Search the signatures of all blocks; `read_removals` then knows what to drop."""
    shutil.rmtree(stage.duplicates, ignore_errors=True)
    stage.duplicates.mkdir(parents=True)
    if isinstance(step, NearDedup):
        buckets = range(step.num_buckets)
        list(pool.map(_match_bucket, [step] * len(buckets), [stage] * len(buckets), buckets))
        pool.submit(_cluster, step, stage).result()
    else:
        pool.submit(_match_exact, stage).result()


def read_removals(step: Step | None, stage: Stage, block: int) -> np.ndarray:
    """Return the positions to drop among the documents of a block that the step looks at.

    Without a step they are those of duplicate ids.
    """
    match step:
        case None:
            path = stage.duplicates / f"{block:06d}.ids"
        case NearDedup():
            path = stage.duplicates / "remove" / f"{block:06d}.remove"
        case _:
            path = stage.duplicates / "00000" / f"{block:05d}.c4_dup"
    if not path.exists():
        return np.empty(0, dtype=REMOVALS_DTYPE)
    return np.sort(np.fromfile(path, dtype=REMOVALS_DTYPE))


def write_removals(stage: Stage, block: int, positions: list[int]) -> None:
    """Write the positions of documents with duplicate ids in a block."""
    stage.duplicates.mkdir(exist_ok=True)
    path = stage.duplicates / f"{block:06d}.ids"
    np.array(positions, dtype=REMOVALS_DTYPE).tofile(path)


def check_num_blocks(num_blocks: int) -> None:
    """Check that datatrove's file format can hold the blocks.

    Raises:
        PipelineError: it cannot.
    """
    if num_blocks >= MAX_BLOCKS:
        raise PipelineError(
            f"{num_blocks} blocks are more than the {MAX_BLOCKS - 1} that deduplication can order; "
            "give a larger block_documents"
        )


def _match_bucket(step: NearDedup, stage: Stage, bucket: int) -> None:
    block = MinhashDedupBuckets(
        str(stage.signatures), str(stage.duplicates / "pairs"), config=_minhash_config(step)
    )
    block.run(None, bucket, step.num_buckets)  # type: ignore[arg-type]  # its first block has no input


def _cluster(step: NearDedup, stage: Stage) -> None:
    folders = (str(stage.duplicates / "pairs"), str(stage.duplicates / "remove"))
    with contextlib.redirect_stderr(io.StringIO()):  # datatrove's progress bars
        MinhashDedupCluster(*folders, config=_minhash_config(step)).run()


def _match_exact(stage: Stage) -> None:
    block = ExactFindDedups(
        str(stage.signatures), str(stage.duplicates), _exact_config(lambda _: 1)
    )
    with contextlib.redirect_stderr(io.StringIO()):
        block.run()


def _minhash_config(step: NearDedup) -> MinhashConfig:
    return MinhashConfig(
        n_grams=step.n_grams,
        num_buckets=step.num_buckets,
        hashes_per_bucket=step.hashes_per_bucket,
        seed=step.seed,
        norm_config=TextNormConfig(norm_numbers=step.norm_numbers),
        hash_config=HASH_CONFIG,
    )


def _exact_config(priority: Callable[[DatatroveDocument], int]) -> ExactDedupConfig:
    return ExactDedupConfig(_content, priority, hash_config=HASH_CONFIG)


def _content(document: DatatroveDocument) -> str:
    return document.text
