"""Files of problems are read as they are, and what is wrong is named by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from ring_train.data.errors import DataError
from ring_train.data.problems import read_problems

USER = {"role": "user", "content": "What is 1 + 1?"}


def write(path: Path, *records: Any) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_both_forms_are_read_in_order(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    path = write(
        tmp_path / "math.jsonl",
        {"problem": "1 + 1?", "answer": "2"},
        {"id": "sum-9", "messages": [system, USER], "answer": "2"},
    )
    first, second = read_problems("math", path, None)
    assert (first.id, first.place, first.domain) == ("1", f"{path}:1", "math")
    assert first.messages == ({"role": "user", "content": "1 + 1?"},)
    assert first.is_text
    assert (second.id, second.answer) == ("sum-9", "2")
    assert second.messages == (system, USER)
    assert not second.is_text


def test_a_limit_takes_the_first_and_looks_at_no_more(tmp_path: Path) -> None:
    path = write(tmp_path / "x", *[{"problem": str(n), "answer": "1"} for n in range(5)], "broken")
    assert [p.messages[0]["content"] for p in read_problems("x", path, 3)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "bad.jsonl:2 is not JSON"),
        ("", "bad.jsonl:2 is not JSON"),
        ('{"problem": "x", "answer": ' + "7" * 5000 + "}", "bad.jsonl:2 is not JSON .Exceeds"),
        ("[" * 100_000, "bad.jsonl:2 is not JSON .*recursion"),
        (r'{"problem": "\ud83d", "answer": "2"}', "bad.jsonl:2 is not JSON .*surrogates"),
        ([1], "bad.jsonl:2 is list, not an object"),
        ({"problem": "x"}, "bad.jsonl:2 has no answer .None."),
        ({"problem": "x", "answer": " "}, "bad.jsonl:2 has no answer"),
        ({"problem": "x", "answer": 2}, "bad.jsonl:2 has no answer .2."),
        ({"problem": " ", "answer": "2"}, "bad.jsonl:2: problem=' ' is empty"),
        ({"problem": 3, "answer": "2"}, "bad.jsonl:2: problem=3 is empty"),
        ({"question": "x", "answer": "2"}, "bad.jsonl:2 has the unknown key question; use answer"),
        ({"answer": "2"}, "bad.jsonl:2 must have either problem or messages"),
        ({"problem": "x", "messages": [USER], "answer": "2"}, "must have either problem or"),
        ({"messages": [], "answer": "2"}, "messages is no list of messages"),
        ({"messages": [{"role": "user"}], "answer": "2"}, "message 0 is not .role, content."),
        ({"messages": [{**USER, "content": ""}], "answer": "2"}, "message 0 has content=''"),
        (
            {"messages": [USER, {"role": "assistant", "content": "2"}], "answer": "2"},
            "the last message is of 'assistant', and there is nothing to answer",
        ),
        ({"id": 7, "problem": "x", "answer": "2"}, "id=7 is not a name"),
    ],
)
def test_bad_lines_are_named(record: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", {"problem": "1", "answer": "1"}, record)
    with pytest.raises(DataError, match=message):
        read_problems("math", path, None)


def test_repeated_ids_are_named_with_both_lines(tmp_path: Path) -> None:
    plain = {"problem": "x", "answer": "2"}
    named = {**plain, "id": "sum"}
    path = write(tmp_path / "x", named, plain, named, {**plain, "id": "2"})
    with pytest.raises(DataError) as caught:
        read_problems("math", path, None)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:3: id='sum' is that of {path}:1 ")
    assert second.startswith(f"{path}:4: id='2' is that of {path}:2 ")
    assert len(read_problems("math", path, 2)) == 2


def test_the_first_bad_lines_are_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", *["{"] * 8)
    with pytest.raises(DataError) as caught:
        read_problems("math", path, None)
    lines = str(caught.value).splitlines()
    assert [line.split(" ")[0] for line in lines[:-1]] == [f"{path}:{n}" for n in range(1, 6)]
    assert lines[-1] == "and 3 more"


def test_files_that_hold_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"problems.math=.*empty.jsonl is empty; give at least"):
        read_problems("math", write(tmp_path / "empty.jsonl"), None)
    with pytest.raises(DataError, match=r"nowhere.jsonl cannot be read"):
        read_problems("math", tmp_path / "nowhere.jsonl", None)
    (tmp_path / "latin.jsonl").write_bytes(b'{"problem": "\xe9", "answer": "1"}\n')
    with pytest.raises(DataError, match=r"latin.jsonl cannot be read .*utf-8"):
        read_problems("math", tmp_path / "latin.jsonl", None)
