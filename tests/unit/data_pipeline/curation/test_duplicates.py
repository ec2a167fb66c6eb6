"""Exact and near duplicates."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.config import PipelineError
from data_pipeline.curation.duplicates import (
    SHINGLES_AT_ONCE,
    BoundedSignature,
    check_num_blocks,
)
from data_pipeline.curation.words import PLAIN_WORDS
from data_pipeline.documents import Document
from tests.unit.data_pipeline.curation.corpora import curated, kept_ids, prose, reasons


def renamed(document: Document, name: str, **changes: Any) -> Document:
    return dataclasses.replace(document, id=name, **changes)


def without_every_80th_word(text: str) -> str:
    """Return a text that shares about seven in eight runs of five words with the given one."""
    return " ".join(word for n, word in enumerate(text.split()) if n % 80 != 79)


def test_the_first_of_equal_documents_is_kept_wherever_the_others_are(tmp_path: Path) -> None:
    documents = prose(12)
    copies = [renamed(documents[n], f"copy of {n}", domain="web") for n in (0, 5, 11)]
    # The copies come early in their blocks, later than the originals in the whole.
    report = curated(tmp_path, [*documents, *copies], {"exact_dedup": {}}, block_documents=4)
    assert sorted(kept_ids(tmp_path)) == sorted(document.id for document in documents)
    assert reasons(report) == {"exact_dedup: duplicate": 3}


def test_only_equal_text_is_an_exact_duplicate(tmp_path: Path) -> None:
    first = prose(1)[0]
    other = renamed(first, "other", text=first.text + " ")
    curated(tmp_path, [first, other], {"exact_dedup": {}})
    assert kept_ids(tmp_path) == [first.id, "other"]


def test_near_duplicates_are_found_and_unrelated_documents_kept(tmp_path: Path) -> None:
    documents = prose(30)
    originals = [document for document in documents if len(document.text) > 2000][:6]
    edits = [
        renamed(document, f"edit {n}", text=without_every_80th_word(document.text))
        for n, document in enumerate(originals)
    ]
    report = curated(tmp_path, [*documents, *edits], {"near_dedup": {}}, block_documents=7)
    left = kept_ids(tmp_path)
    for n, document in enumerate(originals):
        assert (document.id in left) != (f"edit {n}" in left)
    unrelated = {document.id for document in documents} - {document.id for document in originals}
    assert unrelated <= set(left)
    assert reasons(report) == {"near_dedup: near_duplicate": len(edits)}


def test_numbers_can_tell_documents_apart(tmp_path: Path) -> None:
    tables = [
        Document(f"table {n}", " ".join(f"line {n * 1000 + k} plus" for k in range(60)), "math")
        for n in range(5)
    ]
    for numbers, num_kept in ((True, 1), (False, 5)):
        folder = tmp_path / str(numbers)
        folder.mkdir()
        curated(folder, tables, {"near_dedup": {"norm_numbers": numbers}})
        assert len(kept_ids(folder)) == num_kept


@pytest.mark.parametrize("step", ["exact_dedup", "near_dedup"])
def test_documents_of_other_domains_are_not_looked_at(tmp_path: Path, step: str) -> None:
    documents = prose(8)
    web = [renamed(document, f"web {n}", domain="web") for n, document in enumerate(documents)]
    code = [renamed(document, f"code {n}", domain="code") for n, document in enumerate(documents)]
    mixed = [document for three in zip(documents, web, code, strict=True) for document in three]
    report = curated(tmp_path, mixed, {step: {"domains": ["web", "prose"]}}, block_documents=5)
    left = kept_ids(tmp_path)
    assert [name for name in left if name.startswith("code")] == [d.id for d in code]
    assert len(left) == 16
    assert {row["domain"] for row in report["dropped"]} <= {"web", "prose"}


def test_the_signature_of_a_long_document_is_that_of_datatrove(tmp_path: Path) -> None:
    block = BoundedSignature(str(tmp_path), language=PLAIN_WORDS)  # type: ignore[arg-type]  # either is taken
    generator = np.random.default_rng(0)
    shingles = generator.integers(0, 2**63, size=(2 * SHINGLES_AT_ONCE + 7, 1), dtype=np.uint64)
    whole = super(BoundedSignature, block).get_signature(shingles)
    assert block.get_signature(shingles) == whole


def test_more_blocks_than_the_format_can_order_are_refused() -> None:
    check_num_blocks(65533)
    with pytest.raises(PipelineError, match="larger block_documents"):
        check_num_blocks(65534)
