"""Whole curations: every document is accounted for, whatever the steps and the workers."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.config import PipelineError
from data_pipeline.curation.arguments import Compression, Curate, Dropped
from data_pipeline.curation.chain import curate, read_steps
from data_pipeline.curation.passes import Pass, run_block
from data_pipeline.curation.stages import Stage, write_tally
from data_pipeline.curation.tally import Tally, check_conservation
from data_pipeline.documents import Document
from tests.unit.data_pipeline.curation.corpora import (
    curated,
    drops,
    kept,
    kept_ids,
    prose,
    reasons,
    write_corpus,
)

CHAIN: dict[str, Any] = {
    "normalize": {},
    "exact_dedup": {},
    "length": {"min_characters": 40},
    "near_dedup": {"num_buckets": 4, "hashes_per_bucket": 4},
    "sample": {"fraction": 0.8},
}
TEXTS = st.text(st.sampled_from("ab \r\n\x07e\u0301"), min_size=1, max_size=60)


def mixed_corpus() -> list[Document]:
    """Return prose with copies, edited copies and short documents among it."""
    documents = prose(24)
    documents[5:5] = [dataclasses.replace(documents[0], id="copy", domain="web")]
    documents[9:9] = [dataclasses.replace(documents[2], id="edit", text=documents[2].text + " Yes")]
    return [*documents, Document("short", "too short", "web")]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_chain_drops_what_it_should_and_says_so(tmp_path: Path) -> None:
    report = curated(tmp_path, mixed_corpus(), CHAIN)
    counts = reasons(report)
    assert counts["exact_dedup: duplicate"] == 1
    assert counts["near_dedup: near_duplicate"] == 1
    assert counts["length: too_short"] == 1
    assert report["totals"]["read"]["documents"] == 27
    written = {record["id"]: record for record in drops(tmp_path)}
    assert written["copy"] == {
        "id": "copy",
        "domain": "web",
        "step": "exact_dedup",
        "reason": "duplicate",
        "text": mixed_corpus()[0].text,
    }
    assert len(written) == report["totals"]["dropped"]["documents"] == sum(counts.values())
    assert set(kept_ids(tmp_path)).isdisjoint(written)


def test_documents_keep_their_order_text_and_metadata(tmp_path: Path) -> None:
    documents = [
        dataclasses.replace(document, metadata={"number": n}, domain="ab"[n % 2])
        for n, document in enumerate(prose(20))
    ]
    documents.append(
        Document("chat", "", "a", messages=[{"role": "user", "content": "how does it go?"}])
    )
    curated(tmp_path, documents, {"length": {}}, block_documents=3)
    assert kept(tmp_path) == sorted(documents, key=lambda document: document.domain)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(st.tuples(TEXTS, st.sampled_from("xyz")), min_size=1, max_size=30),
    order=st.permutations(list(CHAIN)),
    block_documents=st.integers(1, 12),
)
def test_what_is_read_is_kept_or_dropped(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[tuple[str, str]],
    order: list[str],
    block_documents: int,
) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    documents = [Document(str(n), text, domain) for n, (text, domain) in enumerate(texts)]
    chain = {name: CHAIN[name] for name in order} | {"length": {"min_characters": 5}}
    report = curated(folder, documents, chain, block_documents=block_documents)
    ids = kept_ids(folder) + [record["id"] for record in drops(folder)]
    assert sorted(ids, key=int) == [document.id for document in documents]
    left = {document.id: len(document.text) for document in kept(folder)}
    assert report["totals"]["kept"] == {"documents": len(left), "characters": sum(left.values())}
    lost = sum(row["characters"] for row in report["dropped"])
    edited = sum(row["characters_removed"] for row in report["edited"])
    assert sum(len(text) for text, _ in texts) == sum(left.values()) + lost + edited


@pytest.mark.parametrize("key", ["kept", "dropped"])
@pytest.mark.parametrize(("documents", "characters"), [(1, 0), (0, 1), (-1, 0)])
def test_a_count_that_does_not_come_out_is_an_error(
    key: str, documents: int, characters: int
) -> None:
    tally = Tally()
    tally.add(("read", "web"), 100, 10)
    tally.add(("kept", "web"), 60, 7)
    tally.add(("dropped", "length", "too_short", "web"), 30, 3)
    tally.add(("edited", "normalize", "web"), 10, 2)
    check_conservation(tally)
    name = ("kept", "web") if key == "kept" else ("dropped", "x", "y", "web")
    tally.add(name, characters, documents)
    with pytest.raises(PipelineError, match="domain 'web'"):
        check_conservation(tally)


def test_workers_and_interruptions_do_not_change_the_output(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, mixed_corpus())
    outputs = [tmp_path / name for name in ("one", "two")]
    for workers, output in enumerate(outputs, start=1):
        curate(
            Curate(
                input=source,
                output=str(output),
                steps=CHAIN,
                workers=workers,
                block_documents=5,
                compression=Compression.zst,
                dropped=Dropped.text,
            )
        )
    assert folder_bytes(outputs[0]) == folder_bytes(outputs[1])
    assert not list(tmp_path.glob("*.partial"))


def test_blocks_do_not_change_the_documents(tmp_path: Path) -> None:
    for block_documents in (3, 1000):
        folder = tmp_path / str(block_documents)
        folder.mkdir()
        curated(folder, mixed_corpus(), CHAIN, block_documents=block_documents)
    assert kept(tmp_path / "3") == kept(tmp_path / "1000")


def command(folder: Path, source: str) -> list[str]:
    words = [f"input={source}", f"output={folder / 'out'}", "curation=light", "block_documents=2"]
    return [sys.executable, "-m", "data_pipeline.curate", *words, "workers=2"]


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return found + [below for child in found for below in descendants(child)]


def test_a_killed_run_leaves_nothing_that_reads_as_whole_and_is_taken_up(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, prose())
    process = subprocess.Popen(command(tmp_path, source), stderr=subprocess.DEVNULL)
    work = tmp_path / "out.partial"
    deadline = time.monotonic() + 200
    while not list(work.glob("pass-1/tallies/00000[1-9].json")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    workers = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    while any(Path(f"/proc/{pid}").exists() and alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.05)
    result = subprocess.run(command(tmp_path, source), capture_output=True, text=True, check=True)
    assert "going on with an interrupted run" in result.stderr
    whole = tmp_path / "whole"
    whole.mkdir()
    steps = {"normalize": {}, "exact_dedup": {}, "near_dedup": {}}
    curated(whole, prose(), steps, block_documents=50, dropped=Dropped.ids)
    assert kept(tmp_path) == kept(whole)
    assert not work.exists()


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_half_written_block_is_done_again(tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    curated(reference, mixed_corpus(), CHAIN, block_documents=5)

    def torn_write(path: Path, tally: Tally) -> None:
        if path.match("pass-3/tallies/000001.json"):
            piece = next((path.parents[1] / "pieces" / "000001").iterdir())
            os.truncate(piece, piece.stat().st_size // 2)
            raise OSError(28, "No space left on device", str(piece))
        write_tally(path, tally)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.curation.passes.write_tally", torn_write)
        with pytest.raises(PipelineError, match=r"No space left.*nothing was published"):
            curated(tmp_path, mixed_corpus(), CHAIN, block_documents=5)
    assert not (tmp_path / "out").exists()
    curate(
        Curate(
            input=str(tmp_path / "corpus.jsonl"),
            output=str(tmp_path / "out"),
            steps=CHAIN,
            block_documents=5,
            dropped=Dropped.text,
        )
    )
    assert folder_bytes(tmp_path / "out").keys() == folder_bytes(reference / "out").keys()
    assert kept(tmp_path) == kept(reference)


def test_a_block_that_has_its_tally_is_left_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "pass-1")
    task = Pass(
        source=Stage(tmp_path / "gone"),
        stage=stage,
        removal=None,
        rules=(),
        signed_for=None,
        write_dropped=False,
        with_text=False,
        zstd=False,
    )
    stage.make_folders()
    with pytest.raises(FileNotFoundError, match="gone"):
        run_block(task, 0)
    assert not stage.tally(0).exists()
    write_tally(stage.tally(0), Tally())
    run_block(task, 0)


def test_a_full_disk_is_reported_and_nothing_is_published(tmp_path: Path) -> None:
    source = write_corpus(tmp_path, prose())
    limited = f"ulimit -f 200; exec {' '.join(command(tmp_path, source))}"
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "nothing was published" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_finished_folder_is_kept_and_another_curation_refused(tmp_path: Path) -> None:
    curated(tmp_path, prose(5), {"length": {}})
    report = tmp_path / "out" / "curation.json"
    before = report.stat().st_mtime_ns
    arguments: dict[str, Any] = {
        "input": str(tmp_path / "corpus.jsonl"),
        "output": str(tmp_path / "out"),
        "dropped": Dropped.text,
    }
    curate(Curate(steps={"length": {}}, **arguments))
    assert report.stat().st_mtime_ns == before
    with pytest.raises(PipelineError, match="not the result of these steps"):
        curate(Curate(steps={"length": {"min_characters": 9}}, **arguments))


def test_two_curations_of_one_output_are_refused(tmp_path: Path) -> None:
    import fcntl

    work = tmp_path / "out.partial"
    work.mkdir()
    descriptor = os.open(work, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(PipelineError, match="in use by another curation"):
            curated(tmp_path, prose(2), {"length": {}})
    finally:
        os.close(descriptor)


def test_large_domains_are_split_into_files(tmp_path: Path) -> None:
    report = curated(tmp_path, prose(30), {"length": {}}, block_documents=4, file_bytes=5_000)
    assert len(report["files"]) > 2
    assert [record["name"] for record in report["files"]] == sorted(
        path.name for path in (tmp_path / "out").glob("*.jsonl")
    )
    assert kept(tmp_path) == prose(30)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"lenght": {}}, "steps.lenght: 'lenght' is not a step; did you mean 'length'"),
        ({"a": {"step": "gopher"}}, "steps.a: 'gopher' is not a step"),
        ({"length": {"min_chars": 3}}, "steps.length.min_chars .*did you mean 'min_characters'"),
        ({"length": {"min_characters": "x"}}, "steps.length.min_characters: .*Integer"),
        ({"length": 3}, "steps.length=3 is no mapping"),
        ({"length": {"min_characters": 9, "max_characters": 3}}, "steps.length: max_characters=3"),
        ({"sample": {"fraction": 1.5}}, "steps.sample: fraction=1.5 is not between 0 and 1"),
        ({"regex": {}}, "steps.regex.regex_exp must be given"),
        ({"normalize": {"form": "NFX"}}, "steps.normalize.form: .*NFX"),
        ({"length": None}, "steps is empty"),
        ({"ftfy": {}}, "steps.ftfy: Please install"),
        ({"decontaminate": {"evaluation": "/nowhere/*"}}, "steps.decontaminate: .*no file"),
    ],
)
def test_wrong_steps_are_refused_before_anything_is_read(
    steps: dict[str, Any], message: str
) -> None:
    with pytest.raises(PipelineError, match=message):
        read_steps(steps)


@pytest.mark.parametrize(
    "step", [{"step": "length", "domains": ["pros"]}, {"step": "sample", "by_domain": {"pros": 1}}]
)
def test_a_domain_that_no_document_has_is_refused(tmp_path: Path, step: dict[str, Any]) -> None:
    with pytest.raises(PipelineError, match=r"steps.a names .*'pros'.* did you mean 'prose'"):
        curated(tmp_path, prose(2), {"a": step})


def test_a_domain_that_loses_all_documents_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    short = Document("short", "short", "web")
    report = curated(tmp_path, [*prose(2), short], {"length": {"min_characters": 100}})
    assert "domain web: no document is left" in caplog.text
    assert report["domains"]["kept"].keys() == {"prose"}


@pytest.mark.parametrize("name", ["workers", "block_documents", "file_bytes"])
def test_numbers_below_one_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(PipelineError, match=f"{name}=0 is below 1"):
        curated(tmp_path, prose(1), {"length": {}}, **{name: 0})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the mean of no words
def test_a_document_that_breaks_a_rule_is_named(tmp_path: Path) -> None:
    steps = {"gopher_quality": {"min_doc_words": None}}
    with pytest.raises(PipelineError, match=r"steps.gopher_quality, document 'bad'.*ZeroDivision"):
        curated(tmp_path, [Document("bad", " \n", "web")], steps)


def test_the_report_says_what_went_in(tmp_path: Path) -> None:
    report = curated(tmp_path, prose(3), {"minimum": {"step": "length", "min_characters": 2}})
    assert report["inputs"][0]["documents"] == 3
    assert len(report["inputs"][0]["sha256"]) == 64
    assert report["steps"][0]["name"] == "minimum"
    assert report["steps"][0]["parameters"]["min_characters"] == 2
    assert (
        json.dumps(report, sort_keys=True, indent=2) + "\n"
        == (tmp_path / "out" / "curation.json").read_text()
    )
