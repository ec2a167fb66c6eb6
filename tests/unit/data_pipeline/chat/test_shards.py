"""Shards of conversations: read back by the trainer, the same for any workers and after a kill."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from data_pipeline.sources import SourceOptions, find_inputs
from data_pipeline.sources.hub import read_hub
from ring_train.data.batch import make_batch
from ring_train.data.index import IndexFolder
from ring_train.data.samples import PackedStream, Selection, read_row
from ring_train.data.shards import Expected, open_shard
from tests.unit.data_pipeline.chat.shapes import messages_of, run, write_lines
from tests.unit.data_pipeline.tokenization.test_restarts import (
    Interrupt,
    interrupt_after,
    save_each_block,
)

SUFFIXES = ("bin", "idx", "mask", "ids", "json")
NUM_CONVERSATIONS = 200
SEQ_LENGTH = 512


def answers_of(number: int) -> list[str]:
    return [f"answer {number}.{turn} {'x' * (number % 7)}" for turn in range(1 + number % 3)]


def conversation(number: int) -> dict[str, Any]:
    contents = [part for answer in answers_of(number) for part in (f"question {number}", answer)]
    record: dict[str, Any] = {"messages": messages_of(*contents)}
    return record | ({"id": f"c{number}"} if number % 2 else {})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "chat.jsonl"
    write_lines(path, [conversation(number) for number in range(NUM_CONVERSATIONS)])
    return path


def outcome(prefix: Path) -> dict[str, bytes]:
    return {suffix: Path(f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES}


@pytest.fixture(scope="module")
def quiet(source: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard that one process made in one go."""
    prefix = tmp_path_factory.mktemp("quiet") / "shard"
    run(source, folders["chatml"], prefix, block_kb=1)
    return prefix


def test_the_trainer_learns_the_answers_and_nothing_else(
    quiet: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    manifest = json.loads(Path(f"{quiet}.json").read_text())
    made_by = manifest["tokenizer"]
    expected = Expected(str(folders["chatml"]), made_by["vocab_size"], made_by["eos_token_id"])
    stream = PackedStream(
        "chat",
        open_shard(str(quiet), expected),
        IndexFolder(tmp_path),
        seed=0,
        selection=Selection(),
        seq_length=SEQ_LENGTH,
        cut=False,
    )
    tokenizer = Tokenizer.from_file(f"{folders['chatml']}/tokenizer.json")
    learned: list[str] = []
    num_trained = 0
    for number in range(stream.epoch_length):
        row = read_row(stream, number * stream.step(SEQ_LENGTH), SEQ_LENGTH, 0)
        batch = make_batch([row], document_isolation=True, num_mtp=0)
        labels = batch.labels[batch.loss_mask].tolist()
        num_trained += len(labels)
        text = tokenizer.decode(labels, skip_special_tokens=False)
        learned += text.replace("<|endoftext|>", "").split("<|im_end|>")[:-1]
        assert text.endswith("<|im_end|><|endoftext|>")
    all_answers = [a for number in range(NUM_CONVERSATIONS) for a in answers_of(number)]
    assert sorted(learned) == sorted(all_answers)
    assert num_trained == manifest["chat"]["trained_tokens"]
    assert manifest["chat"]["trained_turns"] == len(all_answers)
    assert manifest["chat"]["conversations"] == manifest["documents"] == NUM_CONVERSATIONS


def test_names_are_those_of_the_records(quiet: Path) -> None:
    names = [json.loads(line) for line in Path(f"{quiet}.ids").read_text().splitlines()]
    assert names[:3] == ["chat.jsonl:1", "c1", "chat.jsonl:3"]


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    source: Path, folders: dict[str, Path], quiet: Path, tmp_path: Path
) -> None:
    run(source, folders["chatml"], tmp_path / "shard", block_kb=1, workers=2)
    assert outcome(tmp_path / "shard") == outcome(quiet)


@pytest.mark.parametrize("num_blocks", [0, 7])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    source: Path,
    folders: dict[str, Path],
    quiet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_blocks: int,
) -> None:
    prefix = tmp_path / "shard"
    save_each_block(monkeypatch)
    with monkeypatch.context() as patch:
        interrupt_after(patch, num_blocks)
        with pytest.raises(Interrupt):
            run(source, folders["chatml"], prefix, block_kb=1)
    for suffix in ("bin", "ids", "mask"):  # what a torn write leaves after the commit
        with Path(f"{prefix}.{suffix}.partial").open("ab") as stream:
            stream.write(b"torn")
    run(source, folders["chatml"], prefix, block_kb=1)
    assert outcome(prefix) == outcome(quiet)
    assert {path.suffix[1:] for path in tmp_path.iterdir()} == set(SUFFIXES)


def test_another_template_is_another_job(
    source: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """All folders hold the same tokenizer.json."""
    first = run(source, folders["chatml"], tmp_path / "shard")
    second = run(source, folders["stripped"], tmp_path / "shard")
    assert {n for n in first["job"] if first["job"][n] != second["job"][n]} == {"chat"}
    assert first["bin_sha256"] != second["bin_sha256"]


def test_a_shard_of_text_takes_the_mask_of_an_older_one_away(
    source: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    run(source, folders["chatml"], tmp_path / "shard")
    assert (tmp_path / "shard.mask").exists()
    write_lines(tmp_path / "text.jsonl", [{"text": "a"}])
    text = tmp_path / "text.jsonl"
    manifest = run(text, folders["chatml"], tmp_path / "shard", format="text")
    assert "mask_sha256" not in manifest
    assert not (tmp_path / "shard.mask").exists()


def test_split_samples_are_named_and_counted(folders: dict[str, Path], tmp_path: Path) -> None:
    thoughts = messages_of("1", "<think>\na\n</think>\n\nb", "2", "c")
    records = [{"messages": thoughts}, {"id": "x", "messages": thoughts}, conversation(1)]
    write_lines(tmp_path / "t.jsonl", records)
    prefix = tmp_path / "shard"
    manifest = run(tmp_path / "t.jsonl", folders["stripped"], prefix, on_rewrite="split")
    names = [json.loads(line) for line in (tmp_path / "shard.ids").read_text().splitlines()]
    assert names == ["t.jsonl:1#2", "t.jsonl:1#4", "x#2", "x#4", "c1"]
    assert manifest["chat"]["split_conversations"] == 2
    assert manifest["chat"]["conversations"] == 3


def test_parquet_and_arrow_and_datasets_hold_the_same_conversations(
    source: Path, folders: dict[str, Path], quiet: Path, tmp_path: Path
) -> None:
    import datasets

    table = pa.Table.from_pylist([conversation(number) for number in range(NUM_CONVERSATIONS)])
    pq.write_table(table, tmp_path / "chat.parquet", row_group_size=50)
    with pa.ipc.new_file(str(tmp_path / "chat.arrow"), table.schema) as writer:
        writer.write_table(table)
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    for name in ("chat.parquet", "chat.arrow", "saved"):
        run(tmp_path / name, folders["chatml"], tmp_path / "shard", input=_source(tmp_path / name))
        for suffix in ("bin", "mask"):
            data = (tmp_path / f"shard.{suffix}").read_bytes()
            assert data == Path(f"{quiet}.{suffix}").read_bytes(), name


def _source(path: Path) -> str:
    return f"hf:{path}" if path.is_dir() else str(path)


def test_datasets_of_conversations_come_in_blocks(tmp_path: Path) -> None:
    import datasets

    rows = [conversation(number) for number in range(NUM_CONVERSATIONS)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    (found,) = find_inputs(f"hf:{tmp_path / 'saved'}")
    blocks = list(read_hub(found, SourceOptions(messages=True), block_bytes=2**10))
    assert len(blocks) > 1
    assert sum(map(len, blocks)) == NUM_CONVERSATIONS


def test_a_table_without_conversations_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    tables = {"text": ["a"], "messages": ["b"]}
    for column, message in (("text", "has no column 'messages'"), ("messages", "not a list")):
        pq.write_table(pa.table({column: tables[column]}), tmp_path / "x.parquet")
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "x.parquet", folders["chatml"], tmp_path / "shard")


def test_the_mask_has_a_byte_a_token(quiet: Path) -> None:
    manifest = json.loads(Path(f"{quiet}.json").read_text())
    mask = np.fromfile(f"{quiet}.mask", dtype=np.uint8)
    assert len(mask) == manifest["tokens"]
    assert set(mask.tolist()) == {0, 1}
    assert mask.sum() == manifest["chat"]["trained_tokens"]
