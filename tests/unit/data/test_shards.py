"""Opening shards: what megatron reads, and every way in which files do not fit."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ring_train.data.errors import DataError
from ring_train.data.shards import Expected, open_shard
from tests.unit.data.shard_files import EOS, VOCAB_SIZE, write_random_shard

type Opened = tuple[Path, list[np.ndarray], Expected]
EXPECTED = Expected(tokenizer="", vocab_size=VOCAB_SIZE, eos_token_id=EOS)


@pytest.fixture
def shard(tmp_path: Path) -> Opened:
    documents = write_random_shard(tmp_path / "code", 50, seed=0)
    expected = dataclasses.replace(EXPECTED, tokenizer=str(tmp_path / "tokenizer"))
    return tmp_path / "code", documents, expected


def test_documents_are_read_back(shard: Opened) -> None:
    prefix, documents, expected = shard
    opened = open_shard(str(prefix), expected)
    read = np.split(opened.tokens, np.cumsum(opened.lengths)[:-1])
    assert [r.tolist() for r in read] == [d.tolist() for d in documents]
    assert opened.num_tokens == sum(map(len, documents))


def test_megatron_reads_the_same_documents(shard: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # megatron warns without it
    importlib.import_module("ring_train.platform")  # before megatron, on a CPU
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix, documents, _ = shard
    dataset = IndexedDataset(str(prefix))
    assert len(dataset) == len(documents)
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))
    for index, document in enumerate(documents):
        assert np.asarray(dataset[index]).tolist() == document.tolist()
        assert np.asarray(dataset.get(index, offset=1)).tolist() == document[1:].tolist()


def test_the_hash_changes_with_the_tokens(tmp_path: Path, shard: Opened) -> None:
    prefix, _, expected = shard
    first = open_shard(str(prefix), expected).sha256
    write_random_shard(prefix, 50, seed=1)
    assert open_shard(str(prefix), expected).sha256 != first


@pytest.mark.parametrize("suffix", ["idx", "bin", "json"])
def test_a_missing_file_names_the_command_that_writes_it(shard: Opened, suffix: str) -> None:
    prefix, _, expected = shard
    prefix.with_suffix(f".{suffix}").unlink()
    with pytest.raises(DataError, match=rf"code.{suffix} does not exist.*data_pipeline.tokenize"):
        open_shard(str(prefix), expected)


def test_a_torn_shard_is_refused(shard: Opened) -> None:
    prefix, _, expected = shard
    with prefix.with_suffix(".bin").open("ab") as stream:
        stream.write(b"\x00\x00")
    with pytest.raises(DataError, match="the files are not of one run"):
        open_shard(str(prefix), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a Megatron index"),
        (b"MMIDIDX\x00\x00" + b"\x00" * 25, "version 0, type code 0"),
        (
            b"MMIDIDX\x00\x00" + b"\x01" + b"\x00" * 7 + b"\x08" + b"\xff" * 8 + b"\x00" * 8,
            "version 1",
        ),
    ],
)
def test_a_damaged_index_is_refused(shard: Opened, content: bytes, message: str) -> None:
    prefix, _, expected = shard
    prefix.with_suffix(".idx").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_shard(str(prefix), expected)


def test_a_manifest_that_is_none_is_refused(shard: Opened) -> None:
    prefix, _, expected = shard
    for text in ("{", "[]", '{"documents": 3}'):
        prefix.with_suffix(".json").write_text(text)
        with pytest.raises(DataError, match="is not a shard's manifest"):
            open_shard(str(prefix), expected)


def test_another_tokenizer_is_refused(shard: Opened) -> None:
    prefix, _, expected = shard
    (prefix.parent / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer fingerprint \w{12} differs from \w{12}"):
        open_shard(str(prefix), expected)


def test_a_folder_without_a_tokenizer_is_refused(shard: Opened) -> None:
    prefix, _, expected = shard
    with pytest.raises(DataError, match=r"data.tokenizer=/nowhere has no tokenizer.json"):
        open_shard(str(prefix), dataclasses.replace(expected, tokenizer="/nowhere"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 511}, "512 ids, more than model.vocab_size=511; .* at least 512"),
        ({"eos_token_id": 0}, "documents end with id 511, not with model.eos_token_id=0"),
    ],
)
def test_a_shard_that_does_not_fit_the_model_is_refused(
    shard: Opened, changes: dict[str, Any], message: str
) -> None:
    prefix, _, expected = shard
    with pytest.raises(DataError, match=message):
        open_shard(str(prefix), dataclasses.replace(expected, **changes))


def test_an_id_beyond_the_tokenizer_counts_as_its_size(shard: Opened) -> None:
    prefix, _, expected = shard
    manifest = json.loads(prefix.with_suffix(".json").read_text())
    manifest["max_token_id"] = 600
    prefix.with_suffix(".json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="601 ids"):
        open_shard(str(prefix), expected)
