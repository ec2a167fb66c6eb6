"""Micro batches against a loop over tokens that states the rules one by one."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ring_train.data.batch import Row, make_batch, pack_documents


def naive_row(row: Row, *, document_isolation: bool, num_mtp: int) -> list[dict[str, Any]]:
    """Return per position: label, position, and per depth (token, label); None where masked."""
    s = len(row.tokens) - 1
    end = s - row.num_padding if row.num_padding else s + 1
    mask = [True] * (s + 1) if row.loss_mask is None else row.loss_mask.tolist()
    starts = set(row.document_starts.tolist()) if document_isolation else set()
    document_of, first_of = [], []
    for i in range(s + 1):
        begins = i == 0 or i in starts
        document_of.append((document_of[-1] if i else -1) + begins)
        first_of.append(i if begins else first_of[-1])

    def ahead(i: int, k: int) -> int | None:
        exists = i + k < min(s + 1, end) and document_of[i + k] == document_of[i]
        return int(row.tokens[i + k]) if exists else None

    def label(i: int, k: int) -> int | None:
        return ahead(i, k) if i + k <= s and mask[i + k] else None

    return [
        {
            "label": label(i, 1),
            "real": i < end,
            "position": i - first_of[i],
            "mtp": [(ahead(i, k), label(i, k + 1)) for k in range(1, num_mtp + 1)],
            "begins": first_of[i] == i,
        }
        for i in range(s)
    ]


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    s = draw(st.integers(1, 12))
    made = []
    for _ in range(draw(st.integers(1, 3))):
        tokens = draw(st.lists(st.integers(1, 50), min_size=s + 1, max_size=s + 1))
        starts = sorted(draw(st.sets(st.integers(1, s), max_size=4)))
        domain = draw(st.integers(0, 2))
        mask = draw(st.none() | st.lists(st.booleans(), min_size=s + 1, max_size=s + 1))
        row = Row(np.array(tokens), domain, np.array(starts, dtype=np.int64))
        made.append(dataclasses.replace(row, loss_mask=None if mask is None else np.array(mask)))
    return made


def padded(row: Row, num_real: int) -> Row:
    """Return the row with nothing after its first positions."""
    s = len(row.tokens) - 1
    starts = sorted({*row.document_starts[row.document_starts < num_real].tolist(), num_real})
    return dataclasses.replace(row, document_starts=np.array(starts), num_padding=s - num_real)


@given(rows(), st.booleans(), st.integers(0, 3), st.integers(1, 8), st.data())
def test_batch_equals_the_loop(
    rows: list[Row], document_isolation: bool, num_mtp: int, multiple: int, data: st.DataObject
) -> None:
    if document_isolation and data.draw(st.booleans()):
        rows = [padded(row, data.draw(st.integers(1, len(row.tokens) - 1))) for row in rows]
    batch = make_batch(
        rows,
        document_isolation=document_isolation,
        num_mtp=num_mtp,
        pad_to_multiple=multiple,
    )
    options = {"document_isolation": document_isolation, "num_mtp": num_mtp}
    expected = [position for row in rows for position in naive_row(row, **options)]
    t = len(expected)
    assert len(batch.tokens) % multiple == 0
    filled = len(batch.tokens) - t
    assert filled < multiple
    real = [position["real"] for position in expected] + [False] * filled
    assert batch.padding_mask.tolist() == [not x for x in real]
    assert batch.num_padding == real.count(False)
    padding = [None] * filled
    labels = [position["label"] for position in expected] + padding
    assert batch.tokens[:t].tolist() == [int(x) for row in rows for x in row.tokens[:-1]]
    assert batch.labels.tolist() == [label or 0 for label in labels]
    assert batch.loss_mask.tolist() == [label is not None for label in labels]
    positions = [position["position"] for position in expected]
    assert batch.position_ids.tolist() == positions + list(range(filled))
    ends = [t, *([t + filled] if filled else [])]
    begins = [i for i, position in enumerate(expected) if position["begins"]]
    assert batch.cu_seqlens.tolist() == begins + ends
    domains = [r.domain for r in rows for _ in r.tokens[:-1]]
    wanted_domains = [d if x else 0 for d, x in zip(domains, real, strict=False)]
    assert batch.domains[:t].tolist() == wanted_domains
    for depth in range(num_mtp):
        seen = [position["mtp"][depth][0] for position in expected] + padding
        wanted = [position["mtp"][depth][1] for position in expected] + padding
        assert batch.mtp_tokens[depth].tolist() == [token or 0 for token in seen]
        assert batch.mtp_labels[depth].tolist() == [label or 0 for label in wanted]
        assert batch.mtp_loss_mask[depth].tolist() == [label is not None for label in wanted]


def test_dtypes_and_shapes_are_as_documented() -> None:
    row = Row(np.arange(9), 1, np.array([4]))
    batch = make_batch([row, row], document_isolation=True, num_mtp=0)
    int64, tensors = torch.int64, vars(batch)
    expected = {
        "tokens": ([16], int64),
        "labels": ([16], int64),
        "loss_mask": ([16], torch.bool),
        "position_ids": ([16], int64),
        "cu_seqlens": ([5], torch.int32),
        "domains": ([16], torch.int16),
        "mtp_tokens": ([0, 16], int64),
        "mtp_labels": ([0, 16], int64),
        "mtp_loss_mask": ([0, 16], torch.bool),
        "padding_mask": ([16], torch.bool),
    }
    for name, (shape, dtype) in expected.items():
        assert (list(tensors[name].shape), tensors[name].dtype) == (shape, dtype), name
    assert batch.to("cpu").num_padding == 0


def test_the_last_position_of_a_row_has_a_label_iff_its_document_continues() -> None:
    tokens = np.arange(1, 6)
    for starts, labelled in (([], True), ([4], False)):
        row = Row(tokens, 0, np.array(starts, dtype=np.int64))
        batch = make_batch([row], document_isolation=True, num_mtp=0)
        assert bool(batch.loss_mask[-1]) is labelled


def test_packed_documents_do_not_reach_into_each_other() -> None:
    batch = pack_documents([[1, 2, 3], [4], [5, 6]], num_mtp=1, pad_to_multiple=4)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert batch.labels.tolist() == [2, 3, 0, 0, 6, 0, 0, 0]
    assert batch.loss_mask.tolist() == [True, True, False, False, True, False, False, False]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6, 8]
    assert batch.mtp_tokens.tolist() == [[2, 3, 0, 0, 6, 0, 0, 0]]
    assert batch.mtp_labels.tolist() == [[3, 0, 0, 0, 0, 0, 0, 0]]
    assert batch.num_padding == 2


@pytest.mark.parametrize("documents", [[], [[1], []]])
def test_empty_documents_are_refused(documents: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="give each at least one token"):
        pack_documents(documents, num_mtp=0)
