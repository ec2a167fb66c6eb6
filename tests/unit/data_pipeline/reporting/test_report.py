"""The page about data, from real curations, shards and ledgers."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from data_pipeline.config import PipelineError
from data_pipeline.report import Report, write_report
from data_pipeline.reporting.figures import COLORS, half_octaves, length_histograms
from data_pipeline.reporting.records import read_ledger, read_shards
from data_pipeline.shard_writer import TokenizerRecord, write_shard
from tests.unit.data_pipeline.curation.corpora import curated, prose

TOKENIZER = TokenizerRecord("0" * 64, 1000, 0)


def write_shards(folder: Path, **lengths: list[int]) -> None:
    for name, of in lengths.items():
        documents = (np.ones(length, dtype=np.int64) for length in of)
        write_shard(folder / name, documents, TOKENIZER)


def entry(step: int, phase: str, **tokens: dict[str, int]) -> dict[str, Any]:
    return {"step": step, "samples": 8 * step, "phase": phase, "tokens": tokens}


def write_ledger(folder: Path, *entries: Any) -> Path:
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(one) + "\n" for one in entries)
    (folder / "ledger.jsonl").write_text(text)
    return folder


def page(folder: Path, **arguments: str) -> str:
    write_report(Report(output=str(folder / "page.html"), **arguments))
    return (folder / "page.html").read_text()


def pictures(html: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [image.imread(io.BytesIO(base64.b64decode(data))) for data in found]


def num_colored(pixels: np.ndarray) -> int:
    """Return the pixels that have a color of the palette."""
    palette = [[int(color[k : k + 2], 16) for k in (1, 3, 5)] for color in COLORS]
    shown = np.rint(255 * pixels[..., :3]).astype(int)
    return sum(int((shown == color).all(axis=-1).sum()) for color in palette)


def test_the_page_shows_all_sources_and_needs_no_network(tmp_path: Path) -> None:
    documents = prose(20)
    copies = [type(documents[0])(f"copy {n}", documents[n].text, "web") for n in range(4)]
    steps = {"exact_dedup": {}, "length": {"min_characters": 600}}
    curated(tmp_path, [*documents, *copies], steps)
    write_shards(tmp_path, general=[5, 700, 90], reasoning=[4000, 20])
    run = write_ledger(
        tmp_path / "run",
        entry(10, "one", one={"general": 68, "reasoning": 32}),
        entry(20, "two", one={"general": 68, "reasoning": 32}, two={"general": 20, "math": 80}),
    )
    html = page(
        tmp_path,
        curation=str(tmp_path / "out"),
        shards=f"{tmp_path}/general.json,{tmp_path}/reason*.json",
        run=str(run),
    )
    assert "24 documents read" in html
    cells = re.sub(r"</?t[dr][^>]*>", " ", html)
    assert re.search(r"web +100.0% +0.0% +0.0%", cells), "read, exact_dedup, length"
    for cell in ("4,020", "795", "83.5%", "duplicate", "too_short", "math"):
        assert cell in html, cell
    assert "200 tokens consumed" in html
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    shown = pictures(html)
    assert len(shown) == 6
    for pixels in shown:
        assert num_colored(pixels) > 400, "nothing is drawn in a domain's or step's color"


def test_a_page_of_one_source_is_enough(tmp_path: Path) -> None:
    curated(tmp_path, prose(3), {"length": {}})
    html = page(tmp_path, curation=str(tmp_path / "out"))
    assert "Nothing was dropped" in html


def test_the_same_sources_give_the_same_page(tmp_path: Path) -> None:
    write_shards(tmp_path, general=[5, 700, 90])
    shards = str(tmp_path / "general.json")
    assert page(tmp_path, shards=shards) == page(tmp_path, shards=shards)


def test_a_run_without_a_ledger_is_tolerated(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert "no ledger yet" in page(tmp_path, run=str(tmp_path / "run"))


def test_steps_that_a_resumed_run_repeats_count_once(tmp_path: Path) -> None:
    run = write_ledger(
        tmp_path / "run",
        *(entry(step, "one", one={"a": step}) for step in (10, 20, 30, 20)),
        entry(40, "one", one={"a": 41}),
    )
    with (run / "ledger.jsonl").open("a") as stream:
        stream.write('{"step": 50, "pha')
    assert [(e.step, e.tokens["a"]) for e in read_ledger(run)] == [(10, 10), (20, 20), (40, 41)]


def test_tokens_of_phases_are_added(tmp_path: Path) -> None:
    run = write_ledger(tmp_path / "run", entry(1, "two", one={"a": 3}, two={"a": 4, "b": 5}))
    assert read_ledger(run)[0].tokens == {"a": 7, "b": 5}


def test_numbered_shards_are_one_domain(tmp_path: Path) -> None:
    write_shards(tmp_path, **{"web-00000": [3, 4], "web-00001": [5], "code": [6]})
    shards = {shard.domain: shard for shard in read_shards(str(tmp_path / "*.json"))}
    assert shards["web"].lengths_tokens.tolist() == [3, 4, 5]
    assert (shards["web"].num_files, shards["code"].num_files) == (2, 1)


def test_half_octaves_hold_every_length_once() -> None:
    lengths = np.array([1, 2, 3, 4, 1023, 1024, 1448, 1449, 2**30])
    bins = half_octaves(lengths)
    assert sum(bins.values()) == len(lengths)
    for k in bins:
        assert any(2 ** (k / 2) <= length < 2 ** ((k + 1) / 2) for length in lengths)


def test_many_domains_still_make_a_figure() -> None:
    panels = [(f"domain {n}", {k: n + 1 for k in range(n, n + 5)}, None) for n in range(20)]
    assert length_histograms(panels, "tokens").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to report on"),
        ({"curation": "{}/nowhere"}, "nowhere/curation.json does not exist"),
        ({"curation": "{}/broken"}, "broken/curation.json cannot be read as JSON"),
        ({"curation": "{}/other"}, "other/curation.json has no domains"),
        ({"shards": "{}/nothing*"}, "matches no file"),
        ({"shards": "{}/other/*.json"}, "is no manifest of a token shard"),
        ({"shards": "{}/torn.json"}, "torn.idx has .* its manifest says"),
        ({"shards": "{}/alone.json"}, "alone.idx does not exist"),
        ({"run": "{}/nowhere"}, "is no folder"),
        ({"run": "{}/bad"}, "ledger.jsonl:1 is no ledger entry"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, arguments: dict[str, str], message: str
) -> None:
    for name, text in (("broken", "{"), ("other", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "curation.json").write_text(text)
    write_shards(tmp_path, torn=[5, 6], alone=[1])
    index = tmp_path / "torn.idx"
    index.write_bytes(index.read_bytes()[:40])
    (tmp_path / "alone.idx").unlink()
    write_ledger(tmp_path / "bad", {"step": 1})
    with pytest.raises(PipelineError, match=message):
        page(tmp_path, **{key: value.format(tmp_path) for key, value in arguments.items()})
    assert not (tmp_path / "page.html").exists()
