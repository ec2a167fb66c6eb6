"""Token shards: contents, order, atomicity."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_pipeline.config import PipelineError
from data_pipeline.documents import Document, write_documents
from data_pipeline.shard_writer import TokenizerRecord, write_shard
from data_pipeline.tokenize import Tokenize, tokenize
from data_pipeline.train_tokenizer import TrainTokenizer, train_tokenizer

RECORD = TokenizerRecord(sha256="0" * 64, vocab_size=1000, eos_token_id=999)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"document {n} says <|endoftext|> and {'x' * n}" for n in range(300)]
    texts[7] = ""
    for part in range(2):
        documents = [
            Document(str(n), texts[n], "prose") for n in range(part * 150, part * 150 + 150)
        ]
        write_documents(folder / f"{part}.jsonl", documents)
    train_tokenizer(
        TrainTokenizer(input=f"{folder}/*.jsonl", output=f"{folder}/tokenizer", vocab_size=300)
    )
    return folder, [text for text in texts if text]


def run(folder: Path, output: Path, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"input": f"{folder}/*.jsonl", "tokenizer": f"{folder}/tokenizer"}
    tokenize(Tokenize(output=str(output), **(arguments | changes)))
    return json.loads((output.parent / f"{output.name}.json").read_text())


def test_documents_keep_their_order_and_end_with_end_of_text(
    corpus: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, texts = corpus
    manifest = run(folder, tmp_path / "shard")
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer/tokenizer.json")
    eos = tokenizer.token_to_id("<|endoftext|>")
    ids = np.fromfile(tmp_path / "shard.bin", dtype=np.uint16)
    ends = np.flatnonzero(ids == eos) + 1
    assert len(ends) == manifest["documents"] == len(texts) == 299
    assert ends[-1] == len(ids) == manifest["tokens"]
    documents = np.split(ids, ends[:-1])
    assert [
        tokenizer.decode(d[:-1].tolist(), skip_special_tokens=False) for d in documents
    ] == texts


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    corpus: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, _ = corpus
    manifests = [run(folder, tmp_path / f"w{workers}", workers=workers) for workers in (1, 2)]
    assert manifests[0] == manifests[1]
    for suffix in ("bin", "idx"):
        one, two = ((tmp_path / f"w{workers}.{suffix}").read_bytes() for workers in (1, 2))
        assert one == two


def test_the_manifest_states_hashes_and_the_tokenizer(
    corpus: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, _ = corpus
    manifest = run(folder, tmp_path / "shard")
    for suffix in ("bin", "idx"):
        data = (tmp_path / f"shard.{suffix}").read_bytes()
        assert manifest[f"{suffix}_sha256"] == hashlib.sha256(data).hexdigest()
    tokenizer = (folder / "tokenizer" / "tokenizer.json").read_bytes()
    assert manifest["tokenizer"] == {
        "sha256": hashlib.sha256(tokenizer).hexdigest(),
        "vocab_size": 300,
        "eos_token_id": 290,
    }
    assert [entry["name"] for entry in manifest["inputs"]] == ["0.jsonl", "1.jsonl"]
    assert manifest["max_token_id"] == 290


def test_a_bad_line_stops_the_command_and_leaves_the_old_shard(
    corpus: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, _ = corpus
    run(folder, tmp_path / "shard")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    good = '{"id": "a", "text": "t", "domain": "d"}\n'
    (tmp_path / "bad.jsonl").write_text(good * 100 + "{")
    with pytest.raises(PipelineError, match=r"bad.jsonl:101 .*is not JSON"):
        run(folder, tmp_path / "shard", input=f"{tmp_path}/bad.jsonl")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "/nowhere"}, "give tokenizer=FOLDER"),
        ({"input": "/nowhere/*.jsonl"}, "matches no file"),
        ({"workers": 0}, "workers=0 is below 1"),
    ],
)
def test_wrong_arguments_are_refused(
    corpus: tuple[Path, list[str]], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        run(corpus[0], tmp_path / "shard", **changes)
    assert not list(tmp_path.iterdir())


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    record = dataclasses.replace(RECORD, vocab_size=157_184)
    manifest = write_shard(tmp_path / "shard", [np.array([70_000, 999])], record)
    assert manifest["dtype"] == "int32"
    assert np.fromfile(tmp_path / "shard.bin", dtype=np.int32).tolist() == [70_000, 999]


def test_an_interrupted_write_leaves_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path / "shard", [np.array([1, 999])], RECORD)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "shard", [np.array([2, 999])], RECORD)
    assert not (tmp_path / "shard.idx").exists()


def test_no_document_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no document to write"):
        write_shard(tmp_path / "shard", [], RECORD)
    assert not list(tmp_path.iterdir())
