"""Bad records, a wrong encoder, dead workers: refused, counted or mended."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config import PipelineError
from data_pipeline.tokenization.encoders import FastEncoder
from tests.unit.data_pipeline.tokenization.runs import run


@pytest.mark.parametrize("workers", [1, 2])
def test_a_fault_is_refused_where_it_is_and_counted_on_request(
    corpus: Path, tmp_path: Path, workers: int
) -> None:
    lines = (corpus / "a.jsonl").read_bytes().splitlines(keepends=True)
    lines[700] = b'{"text": "\xff"}\n'
    lines[900] = b'{"id": "", "text": "t"}\n'
    (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
    arguments = {"input": f"{tmp_path}/x.jsonl", "workers": workers}
    with pytest.raises(PipelineError, match=r"x.jsonl:701 \(byte \d+\) is not UTF-8"):
        run(corpus, tmp_path / "shard", **arguments)
    manifest = run(corpus, tmp_path / "shard", **arguments, on_error="skip")
    empty = manifest["skipped"].pop("empty")
    assert manifest["skipped"] == {"invalid_utf8": 1, "bad_id": 1}
    assert manifest["documents"] == len(lines) - 2 - empty


def test_a_dead_worker_is_named(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = os.getpid()

    def die(_: FastEncoder, texts: list[str]) -> list[np.ndarray]:
        assert os.getpid() != parent, "the parent encodes nothing"
        os._exit(9)

    monkeypatch.setattr(FastEncoder, "encode", die)
    monkeypatch.setattr("data_pipeline.tokenization.shard_run.check_first_documents", lambda *_: 64)
    with pytest.raises(PipelineError, match=r"a worker died .killed, or out of memory"):
        run(corpus, tmp_path / "shard", workers=2)


def test_repeated_ids_are_counted_or_refused(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.tokenization.names.HASHES_A_PASS", 3)
    names = ["a", "b", "a", "c", "a", "b", "d"]
    lines = [json.dumps({"id": name, "text": name}) + "\n" for name in names]
    (tmp_path / "x.jsonl").write_text("".join(lines))
    arguments = {"input": f"{tmp_path}/x.jsonl"}
    with pytest.raises(PipelineError, match=r'3 ids occur again, e.g. "[ab]", "[ab]"; make them'):
        run(corpus, tmp_path / "shard", **arguments, duplicate_ids="refuse")
    assert not (tmp_path / "shard.idx").exists()
    assert run(corpus, tmp_path / "shard", **arguments)["duplicate_ids"] == 3
    assert "3 ids occur again" in caplog.text


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("document", [5, 1400])
def test_the_reference_encodes_all_where_the_fast_encoder_proves_wrong(
    corpus: Path,
    tmp_path: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    document: int,
) -> None:
    """One id of a document is wrong: the first ones are checked all, later ones by sample."""
    encode = FastEncoder.encode
    wrong = json.loads((corpus / "a.jsonl").read_text().splitlines()[document])["text"]

    def mistaken(self: FastEncoder, texts: list[str]) -> list[np.ndarray]:
        found = encode(self, texts)
        return [ids ^ (text == wrong) for ids, text in zip(found, texts, strict=True)]

    monkeypatch.setattr(FastEncoder, "encode", mistaken)
    probe_everything(monkeypatch)
    manifest = run(corpus, tmp_path / "shard", workers=workers)
    assert manifest["encoder"]["name"] == "tokenizers"
    assert "gigatoken makes" in manifest["encoder"]["reason"]
    for suffix in ("bin", "idx", "ids"):
        assert Path(f"{tmp_path}/shard.{suffix}").read_bytes() == expected[suffix]


def probe_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("encode_block", "referee"):
        monkeypatch.setattr(f"data_pipeline.tokenization.{module}.PROBED_FRACTION", 1.0)


def test_a_tokenizer_that_gigatoken_does_otherwise_is_left_to_the_reference(
    corpus: Path, tmp_path: Path
) -> None:
    config = json.loads((corpus / "tokenizer" / "tokenizer.json").read_text())
    config["normalizer"] = {"type": "NFC"}
    (tmp_path / "nfc").mkdir()
    (tmp_path / "nfc" / "tokenizer.json").write_text(json.dumps(config))
    manifest = run(corpus, tmp_path / "shard", tokenizer=f"{tmp_path}/nfc", workers=2)
    assert manifest["encoder"] == {"name": "tokenizers", "reason": "normalizer NFC"}
