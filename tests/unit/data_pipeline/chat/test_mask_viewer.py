"""The mask viewer shows exactly what is trained."""

import html
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from data_pipeline.chat.views import CONTEXT, PLAIN, TRAINED, View, to_terminal
from data_pipeline.config import PipelineError
from data_pipeline.mask_viewer import MaskViewer, view_mask
from tests.unit.data_pipeline.chat.shapes import messages_of, run, write_lines

RECORDS = [
    {"id": "a", "messages": messages_of("hi", "ho")},
    {"id": "b", "messages": messages_of("caf\u00e9 \u4e2d?", "\u4e2d & <b>", "more", "end")},
]
SHOWN = (
    "<|im_start|>user\ncaf\u00e9 \u4e2d?<|im_end|>\n<|im_start|>assistant\n"
    "[[\u4e2d & <b><|im_end|>]]\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    "[[end<|im_end|><|endoftext|>]]\n"
)


@pytest.fixture(scope="module")
def shard(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("viewed")
    write_lines(folder / "chat.jsonl", RECORDS)
    run(folder / "chat.jsonl", folders["chatml"], folder / "shard")
    return folder / "shard"


def view(folder: Path, **arguments: Any) -> None:
    view_mask(MaskViewer(tokenizer=str(folder), **arguments))


def test_a_document_and_its_line_show_the_same(
    shard: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    view(folders["chatml"], shard=str(shard), document=1)
    title, _, text = capsys.readouterr().out.partition("\n")
    assert re.search(r"shard, document 1, b: \d+ tokens, \d+ trained$", title)
    assert text == SHOWN
    view(folders["chatml"], input=f"{shard.parent}/chat.jsonl", line=2)
    assert capsys.readouterr().out.partition("\n")[2] == SHOWN


def test_a_terminal_has_colours(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer.from_file(f"{folders['chatml']}/tokenizer.json")
    ids = tokenizer.encode("1 2").ids[:1] * 3
    text = to_terminal(View("x", ids, [False, True, True]), tokenizer, colors=True)
    assert text.partition("\n")[2] == f"{CONTEXT}1{PLAIN}{TRAINED}11{PLAIN}\n"


def test_the_page_marks_every_trained_token(
    shard: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    page = tmp_path / "mask.html"
    view(folders["chatml"], shard=str(shard), document=1, html=str(page))
    body = page.read_text().partition("<pre>")[2].partition("</pre>")[0]
    spans = re.findall(r"<span class='([tb ]*)' title='(\d+): [\d ]+'>([^<]*)</span>", body)
    marked = [f"[[{text}]]" if "t" in name.split() else text for name, _, text in spans]
    assert html.unescape("".join(marked)).replace("]][[", "") + "\n" == SHOWN
    assert "://" not in page.read_text(), "the page needs no network"


def test_a_split_line_shows_each_sample(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = ("1", "<think>\na\n</think>\n\nb", "2", "c")
    write_lines(tmp_path / "x.jsonl", [{"messages": messages_of(*contents)}])
    source = f"{tmp_path}/x.jsonl"
    view(folders["stripped"], input=source, on_rewrite="split")
    shown = capsys.readouterr().out
    assert "x.jsonl:1, message 2: " in shown
    assert "x.jsonl:1, message 4: " in shown
    with pytest.raises(PipelineError, match=r"x.jsonl:1 has message 2, .*\[rewritten\]; repair"):
        view(folders["stripped"], input=source)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of them is wanted; give shard=PREFIX"),
        ({"shard": "SHARD", "document": 2}, "document=2 is not in .*; choose 0 to 1"),
        ({"shard": "/nowhere"}, "manifest /nowhere.json cannot be read"),
        ({"input": "LINES", "line": 3}, "line=3 is not in .*; it has 1 to 2"),
        ({"input": "BAD"}, r"bad.jsonl:1 .*is not JSON .*\[invalid_json\]; repair it"),
    ],
)
def test_wrong_arguments_are_refused(
    shard: Path, folders: dict[str, Path], arguments: dict[str, Any], message: str
) -> None:
    (shard.parent / "bad.jsonl").write_text("{\n")
    paths = {
        "SHARD": str(shard),
        "LINES": f"{shard.parent}/chat.jsonl",
        "BAD": f"{shard.parent}/bad.jsonl",
    }
    filled = {key: paths.get(value, value) for key, value in arguments.items()}
    with pytest.raises(PipelineError, match=message):
        view(folders["chatml"], **filled)


def test_another_tokenizer_or_a_shard_of_text_is_refused(
    shard: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(
        (folders["chatml"] / "tokenizer.json").read_text() + "\n"
    )
    with pytest.raises(PipelineError, match="is not the one that made"):
        view(tmp_path, shard=str(shard))
    write_lines(tmp_path / "text.jsonl", [{"text": "a"}])
    run(tmp_path / "text.jsonl", folders["chatml"], tmp_path / "text", format="text")
    with pytest.raises(PipelineError, match="has no loss mask: every token is trained"):
        view(folders["chatml"], shard=str(tmp_path / "text"))
