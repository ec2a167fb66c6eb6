"""What a run writes: the same bytes by any number of workers, and those of megatron."""

import gzip
import hashlib
import importlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.unit.data_pipeline.tokenization.runs import NUM_DOCUMENTS, SUFFIXES, outcome, run


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_no_byte(
    corpus: Path, tmp_path: Path, expected: dict[str, bytes], workers: int
) -> None:
    run(corpus, tmp_path / "shard", workers=workers)
    assert outcome(tmp_path / "shard") == expected
    assert {path.suffix[1:] for path in tmp_path.iterdir()} == set(SUFFIXES)


def test_the_size_of_blocks_changes_no_token(
    corpus: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    run(corpus, tmp_path / "shard", block_kb=1000)
    for suffix in ("bin", "idx", "ids"):
        assert Path(f"{tmp_path}/shard.{suffix}").read_bytes() == expected[suffix]


def test_the_tokens_are_those_of_the_reference(corpus: Path, expected: dict[str, bytes]) -> None:
    tokenizer = Tokenizer.from_file(f"{corpus}/tokenizer/tokenizer.json")
    tokenizer.encode_special_tokens = True
    eos = tokenizer.token_to_id("<|endoftext|>")
    lines = [
        *(corpus / "a.jsonl").read_bytes().splitlines(),
        *subprocess.check_output(["gzip", "-dc", str(corpus / "b.jsonl.gz")]).splitlines(),
    ]
    texts = [text for line in lines if (text := json.loads(line)["text"])]
    encodings = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    ids = [token for encoding in encodings for token in (*encoding.ids, eos)]
    assert np.array(ids, dtype=np.uint16).tobytes() == expected["bin"]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # megatron with numpy 2
def test_megatron_writes_the_same_bytes(
    tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")  # megatron warns without it
    importlib.import_module("ring_train.platform")  # before megatron, on a CPU
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    manifest = json.loads(expected["json"])
    tokens = np.frombuffer(expected["bin"], dtype=np.uint16)
    eos = manifest["tokenizer"]["eos_token_id"]
    builder = IndexedDatasetBuilder(f"{tmp_path}/megatron.bin", dtype=np.uint16)
    for document in np.split(tokens, np.flatnonzero(tokens == eos)[:-1] + 1):
        builder.add_document(torch.tensor(document.astype(np.int64)), [len(document)])
    builder.finalize(f"{tmp_path}/megatron.idx")
    for suffix in ("bin", "idx"):
        assert Path(f"{tmp_path}/megatron.{suffix}").read_bytes() == expected[suffix]


def test_the_manifest_accounts_for_every_record(corpus: Path, expected: dict[str, bytes]) -> None:
    manifest = json.loads(expected["json"])
    names = [json.loads(line) for line in expected["ids"].splitlines()]
    first, second = manifest["inputs"]
    skipped = sum(manifest["skipped"].values())
    assert set(manifest["skipped"]) == {"empty"}
    assert len(names) == manifest["documents"] == NUM_DOCUMENTS - skipped
    assert (first["name"], second["name"]) == ("a.jsonl", "b.jsonl.gz")
    assert second["first_document"] == first["documents"]
    assert first["documents"] + second["documents"] == manifest["documents"]
    for entry in (first, second):
        data = (corpus / entry["name"]).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
    contents = {
        "a.jsonl": (corpus / "a.jsonl").read_bytes(),
        "b.jsonl.gz": gzip.decompress((corpus / "b.jsonl.gz").read_bytes()),
    }
    lines = [
        (f"{name}:{number}", json.loads(line))
        for name, content in contents.items()
        for number, line in enumerate(content.splitlines(), start=1)
    ]
    assert names == [record.get("id", place) for place, record in lines if record["text"]]
    assert manifest["encoder"]["name"] == "gigatoken"
    assert manifest["encoder"]["first_documents_checked"] == 64
    assert manifest["encoder"]["later_documents_checked"] >= 2
