"""Sources: every format yields the same documents; what is no document is refused or counted."""

import gzip
import json
import random
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.config import PipelineError
from data_pipeline.documents import Document
from data_pipeline.sources import (
    FaultTally,
    Row,
    SourceOptions,
    find_inputs,
    plan_blocks,
    read_block,
    read_source,
)

RECORDS: list[dict[str, Any]] = [
    {"id": f"d{n}", "text": f"text {n}\n\u00e9\u2028 {'x' * n}", "domain": "prose", "year": n}
    for n in range(50)
]
DOCUMENTS = [Document(r["id"], r["text"], "prose", {"year": r["year"]}) for r in RECORDS]
TWO_GOOD_LINES = b'{"id": "g", "text": "good", "a": 1234}\n{"text": "good"}\n'
assert len(TWO_GOOD_LINES) == 56
LINES = [json.dumps(record).encode() + b"\n" for record in RECORDS]


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(RECORDS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)


def write_zst(path: Path) -> None:
    """Two frames, as appending to a .zst gives."""
    halves = b"".join(LINES[:20]), b"".join(LINES[20:])
    path.write_bytes(b"".join(zstandard.compress(half) for half in halves))


WRITERS = {
    "x.jsonl": lambda path: path.write_bytes(b"".join(LINES)),
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(b"".join(LINES))),
    "x.jsonl.zst": write_zst,
    "x.parquet": lambda path: pq.write_table(
        pa.Table.from_pylist(RECORDS), path, row_group_size=20
    ),
    "x.arrow": write_arrow_file,
    "x.ipc": write_arrow_stream,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_yields_the_same_documents(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert list(read_source(str(tmp_path / name))) == DOCUMENTS


@pytest.mark.parametrize("name", WRITERS)
def test_blocks_neither_lose_nor_repeat_a_row(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    options = SourceOptions()
    (source,) = find_inputs(str(tmp_path / name))
    for block_bytes in (1, 7, 100, 1000, 10**6):
        blocks = list(plan_blocks(source, options, block_bytes))
        found = [read_block(block, options) for block in blocks]
        rows = [row for items, _ in found for row in items if isinstance(row, Row)]
        assert [row.id for row in rows] == [record["id"] for record in RECORDS]
        assert sum(count for _, count in found) == len(RECORDS)
        middle = len(blocks) // 2
        assert list(plan_blocks(source, options, block_bytes, middle)) == blocks[middle:]


def test_a_dataset_on_disk_is_a_source(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(RECORDS)
    dataset.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"valid": dataset}).save_to_disk(str(tmp_path / "split"))
    (tmp_path / "files").mkdir()
    WRITERS["x.jsonl"](tmp_path / "files" / "x.jsonl")
    for source in ("hf:{}/plain", "{}/plain", "hf:{}/split:valid", "hf:{}/files"):
        assert list(read_source(source.format(tmp_path))) == DOCUMENTS
    with pytest.raises(PipelineError, match=r"no split 'train'; choose from valid"):
        list(read_source(f"hf:{tmp_path}/split"))
    with pytest.raises(PipelineError, match=r"no column 'body'; give text_key=NAME, one of id, te"):
        list(read_source(f"{tmp_path}/plain", SourceOptions(text_key="body")))


def test_a_tree_is_one_document_a_file(tmp_path: Path) -> None:
    for name in ("b/z.py", "b/a.py", "a.txt", ".git/config", "b.py"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)
    (tmp_path / "tree" / "b" / "x.png").write_bytes(b"\x89\0")
    tally = FaultTally(SourceOptions())
    found = list(read_source(str(tmp_path / "tree"), tally=tally))
    assert [(d.id, d.text, d.domain) for d in found] == [
        (name, name, "tree") for name in ("a.txt", "b.py", "b/a.py", "b/z.py")
    ]
    assert tally.counts == {"binary": 1}
    single = list(read_source(f"{tmp_path}/tree/b/*.py", SourceOptions(domain="code")))
    assert [(d.id, d.domain) for d in single] == [("a.py", "code"), ("z.py", "code")]


def test_what_a_record_lacks_is_made_up_from_its_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "web.en.jsonl").write_text('{"text": "one"}\n{"text": "two", "id": 7}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    found = list(read_source(f"{tmp_path}/a/*.jsonl,{tmp_path}/b.jsonl"))
    assert [(d.id, d.domain) for d in found] == [
        ("a/web.en.jsonl:1", "web"),
        ("7", "web"),
        ("b.jsonl:1", "b"),
    ]
    options = SourceOptions(domain="news", id_key="key", text_key="body", domain_key="topic")
    (tmp_path / "c.jsonl").write_text('{"body": "t", "key": "k", "topic": "x", "id": 1}\n')
    assert list(read_source(f"{tmp_path}/c.jsonl", options)) == [Document("k", "t", "x", {"id": 1})]


def test_conversations_are_documents(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"id": "c", "messages": turns}) + "\n")
    assert list(read_source(f"{tmp_path}/x.jsonl")) == [Document("c", "", "x", messages=turns)]


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b"{broken", "invalid_json", r"x.jsonl:3 \(byte 56\) is not JSON"),
        (b'{"text": "\xff"}', "invalid_utf8", r"x.jsonl:3 \(byte 66\) is not UTF-8"),
        (b'{"text": "a\0b"}', "nul", r"x.jsonl:3 \(byte 67\) has a NUL byte"),
        (rb'{"text": "a\u0000b"}', "nul", "x.jsonl:3 has a NUL character at 1 of its text"),
        (b'["text"]', "not_an_object", "x.jsonl:3 is a list, not an object"),
        (b'{"id": "a"}', "no_text", "x.jsonl:3 has 'text': None, not a string"),
        (b'{"text": 7}', "no_text", "x.jsonl:3 has 'text': 7, not a string"),
        (b'{"text": "t", "id": ""}', "bad_id", "x.jsonl:3 has 'id': '', no name"),
        (b'{"text": "t", "id": 1.5}', "bad_id", r"x.jsonl:3 has 'id': 1.5, no name"),
        (b"", "invalid_json", "x.jsonl:3 .* is not JSON"),
        (rb'{"text": "\ud800"}', "invalid_json", "x.jsonl:3 .* is not JSON"),
        (b'{"text": "' + b"y" * 2**20 + b'"}', "too_long", r"x.jsonl:3 \(byte 56\) exceeds"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_is_refused_with_its_place_or_counted(
    tmp_path: Path, line: bytes, reason: str, message: str, packed: bool
) -> None:
    data = TWO_GOOD_LINES + line + b"\n" + b'{"text": ""}\n{"id": "last", "text": "good"}\n'
    path = tmp_path / ("x.jsonl.gz" if packed else "x.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    options = SourceOptions(max_document_bytes=2**19)
    with pytest.raises(PipelineError, match=message.replace("jsonl:", r"jsonl(\.gz)?:")):
        list(read_source(str(path), options))
    skip = SourceOptions(max_document_bytes=2**19, on_error="skip")
    tally = FaultTally(skip)
    found = list(read_source(str(path), skip, tally))
    assert [d.id for d in found] == ["g", f"{path.name}:2", "last"]
    assert tally.counts == {reason: 1, "empty": 1}


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_a_line_of_100_mb_is_met_in_bounded_memory(tmp_path: Path, name: str) -> None:
    line = b'{"id": "long", "text": "' + b"y" * 100_000_000 + b'"}\n'
    data = LINES[0] + line + LINES[1]
    pack = {"gz": lambda d: gzip.compress(d, 1), "zst": zstandard.compress}
    path = tmp_path / name
    path.write_bytes(pack.get(name.rpartition(".")[2], bytes)(data))
    del data, line
    options = SourceOptions(on_error="skip", max_document_bytes=2**20)
    tally = FaultTally(options)
    peak = peak_bytes(lambda: [d.id for d in read_source(str(path), options, tally)])
    assert peak[0] == ["d0", "d1"]
    assert tally.counts == {"too_long": 1}
    assert peak[1] < 32 * 2**20


def peak_bytes(run: Any) -> tuple[Any, int]:
    """Return a function's result and the most Python memory it held."""
    import tracemalloc

    tracemalloc.start()
    try:
        return run(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.ipc", "x.parquet", "x.arrow"])
def test_a_cut_file_is_refused_or_counted_never_taken_for_whole(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(PipelineError, match=rf"{name}:\d+ .*\[(truncated|corrupt)\]"):
        list(read_source(str(tmp_path / name)))
    skip = SourceOptions(on_error="skip")
    tally = FaultTally(skip)
    found = list(read_source(str(tmp_path / name), skip, tally))
    assert found == DOCUMENTS[: len(found)]
    assert sum(tally.counts.values()) >= 1


def test_a_flipped_bit_in_gz_is_refused(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b"".join(LINES * 50)))
    packed[-6] ^= 1  # in the checksum
    (tmp_path / "x.jsonl.gz").write_bytes(packed)
    with pytest.raises(PipelineError, match="truncated"):
        list(read_source(f"{tmp_path}/x.jsonl.gz"))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"id": ["a"], "body": ["t"]}, "has no column 'text'; it has id, body: 1 rows"),
        ({"id": ["a"], "text": [7]}, "has column 'text' of type int64, not string: 1 rows"),
        ({"id": ["a"], "text": pa.array([None], pa.string())}, "has 'text': None"),
    ],
)
def test_schema_drift_in_a_later_parquet_file_is_refused_or_counted(
    tmp_path: Path, table: dict[str, Any], message: str
) -> None:
    WRITERS["x.parquet"](tmp_path / "1.parquet")
    pq.write_table(pa.table(table), tmp_path / "2.parquet")
    with pytest.raises(PipelineError, match=rf"2.parquet:1 {message}"):
        list(read_source(f"{tmp_path}/*.parquet"))
    skip = SourceOptions(on_error="skip")
    tally = FaultTally(skip)
    assert list(read_source(f"{tmp_path}/*.parquet", skip, tally)) == DOCUMENTS
    assert sum(tally.counts.values()) == 1


def test_invalid_utf8_in_a_column_is_found_by_row(tmp_path: Path) -> None:
    offsets = pa.py_buffer(struct.pack("<4i", 0, 1, 2, 3))
    column = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xffb"))
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    with pytest.raises(PipelineError, match=r"x.parquet:2 is not UTF-8"):
        list(read_source(f"{tmp_path}/x.parquet"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/*.nothing", r"matches no file; give a file, a folder"),
        ("{}/x.dat", "its suffix does not tell what it holds; put a kind before it"),
        ("parquet:{}", "is a folder; parquet: wants files"),
        ("hf:{}/gone", "cannot be opened"),
    ],
)
def test_a_source_that_cannot_be_told_is_refused(
    tmp_path: Path, source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "x.dat").write_bytes(b"x")
    with pytest.raises(PipelineError, match=message):
        list(read_source(source.format(tmp_path)))


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(PipelineError, match="on_error=ignore is unknown; choose refuse or skip"):
        SourceOptions(on_error="ignore")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=30),
    block_bytes=st.integers(1, 64),
    ends_with_newline=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ranges_hold_each_line_once_wherever_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    block_bytes: int,
    ends_with_newline: bool,
    seed: int,
) -> None:
    rng = random.Random(seed)
    texts = ["".join(rng.choices("ab\u00e9\U0001f600", k=n)) for n in lengths]
    lines = "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts)
    path = tmp_path_factory.mktemp("ranges") / "x.jsonl"
    path.write_text(lines + "\n" * (ends_with_newline and bool(texts)), encoding="utf-8")
    options = SourceOptions()
    (source,) = find_inputs(str(path))
    found = [read_block(b, options) for b in plan_blocks(source, options, block_bytes)]
    rows = [item for items, _ in found for item in items]
    assert [row.text for row in rows if isinstance(row, Row)] == texts
    assert len(rows) == len(texts) == sum(count for _, count in found)
