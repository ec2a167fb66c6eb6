"""The demo corpus, on a small installation made up for the test."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.config import PipelineError
from data_pipeline.demo_corpus import DemoCorpus, write_demo_corpus
from data_pipeline.documents import Document, read_documents
from data_pipeline.math_problems import is_correct, parse_math_line, problem_key


def module(package: str, number: int) -> str:
    names = [f"{package}_value_{number}_{n}" for n in range(12)]
    body = "\n".join(f"    {name} = compute_{name}(argument)" for name in names)
    prose = " ".join(f"The {package} function {number} explains {name}." for name in names)
    repeated = '    """A sentence that every module repeats word for word."""'
    text = f'"""{prose}\n\nMore about {package} {number}."""'
    return f"{text}\n\n\ndef f(argument):\n{repeated}\n{body}\n"


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    site = tmp_path / "site-packages"
    for package in [f"package{n}" for n in range(8)]:
        folder = site / package
        (folder / "tests").mkdir(parents=True)
        (folder / "_vendor").mkdir()
        for number in range(4):
            (folder / f"m{number}.py").write_text(module(package, number))
        (folder / "copied.py").write_text(module("shared", 0))
        (folder / "tests" / "test_x.py").write_text(module(package, 99))
        (folder / "_vendor" / "other.py").write_text(module(package, 98))
        (folder / "README.md").write_text(f"# {package}\n\n" + f"About {package} at length. " * 20)
        (folder / "LICENSE.md").write_text("You may do everything with this. " * 20)
        info = site / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "RECORD").write_text(f"{package}/m0.py,,\n{info.name}/METADATA,,\n")
        summary = f"Metadata of {package} says this. " * 20
        (info / "METADATA").write_text(f"Name: {package}\nVersion: 1.0\n\n{summary}\n")
    (site / "broken.py").write_text("print 1\n")
    (site / "single.py").write_text(module("single", 0))
    return site


def arguments(output: Path, **changes: Any) -> DemoCorpus:
    sizes = {"valid_bytes": 3000, "math_bytes": 60_000, "workers": 1}
    return DemoCorpus(output=str(output), **(sizes | changes))


def read(folder: Path, name: str) -> list[Document]:
    return list(read_documents(folder / f"{name}.jsonl"))


def packages_of(documents: list[Document]) -> set[str]:
    return {document.id.split("/")[1] for document in documents}


def test_packages_are_on_one_side_of_the_split_in_both_domains(
    installation: Path, tmp_path: Path
) -> None:
    write_demo_corpus(arguments(tmp_path / "out"), [installation])
    held_out = set(json.loads((tmp_path / "out/manifest.json").read_text())["held_out_packages"])
    for domain in ("code", "prose"):
        valid = packages_of(read(tmp_path / "out", f"{domain}.valid"))
        train = packages_of(read(tmp_path / "out", f"{domain}.train"))
        assert valid
        assert len(train) > 2
        assert valid <= held_out
        assert not train & held_out


def test_no_docstring_is_in_both_code_and_prose(installation: Path, tmp_path: Path) -> None:
    write_demo_corpus(arguments(tmp_path / "out"), [installation])
    for split in ("train", "valid"):
        code = "".join(d.text for d in read(tmp_path / "out", f"code.{split}"))
        prose = "".join(d.text for d in read(tmp_path / "out", f"prose.{split}"))
        assert "explains" not in code
        assert "explains" in prose
        assert "compute_" not in prose


def test_a_docstring_that_many_modules_repeat_is_kept_once(
    installation: Path, tmp_path: Path
) -> None:
    write_demo_corpus(arguments(tmp_path / "out"), [installation])
    prose = [d.text for s in ("train", "valid") for d in read(tmp_path / "out", f"prose.{s}")]
    assert "".join(prose).count("repeats word for word") == 1


def test_copies_tests_vendored_code_and_licences_are_left_out(
    installation: Path, tmp_path: Path
) -> None:
    write_demo_corpus(arguments(tmp_path / "out"), [installation])
    names = ("code.train", "code.valid", "prose.train", "prose.valid")
    documents = [document for name in names for document in read(tmp_path / "out", name)]
    text = "".join(document.text for document in documents)
    assert sum("shared_value" in d.text for d in documents if d.domain == "code") == 1
    assert sum("The shared function" in d.text for d in documents) == 1
    assert "_98_" not in text
    assert "_99_" not in text
    assert "You may do everything" not in text
    assert "Version: 1.0" not in text
    assert "Metadata of package" in text
    dropped = json.loads((tmp_path / "out/manifest.json").read_text())["dropped"]
    assert dropped["file/not_parseable"] == 1
    assert dropped["code/duplicate"] >= 1


def test_the_same_installation_gives_the_same_bytes(installation: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 2)):
        write_demo_corpus(arguments(tmp_path / name, workers=workers), [installation])
    for path in sorted((tmp_path / "a").glob("*.jsonl")):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    files = [json.loads((tmp_path / n / "manifest.json").read_text())["files"] for n in "ab"]
    assert files[0] == files[1]


def test_math_lines_parse_are_correct_and_split_without_overlap(
    installation: Path, tmp_path: Path
) -> None:
    write_demo_corpus(arguments(tmp_path / "out"), [installation])
    keys = {}
    for split in ("train", "valid"):
        text = "".join(document.text for document in read(tmp_path / "out", f"math.{split}"))
        lines = text.splitlines(keepends=True)
        problems = [problem for line in lines if (problem := parse_math_line(line)) is not None]
        assert all(map(is_correct, problems))
        keys[split] = {problem_key(problem) for problem in problems}
        assert len(keys[split]) == len(problems) == len(lines) > 10
    assert not keys["train"] & keys["valid"]


def test_too_little_text_to_hold_out_is_refused(installation: Path, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="valid_bytes=1000000"):
        write_demo_corpus(arguments(tmp_path / "out", valid_bytes=1_000_000), [installation])
    assert not (tmp_path / "out/manifest.json").exists()


def test_distributions_of_one_import_name_give_documents_of_different_ids(
    installation: Path, tmp_path: Path
) -> None:
    info = installation / "package0_bindings-2.0.dist-info"
    info.mkdir()
    (info / "RECORD").write_text(f"package0/m1.py,,\n{info.name}/METADATA,,\n")
    summary = "The bindings are another distribution with a text of its own. " * 20
    (info / "METADATA").write_text(f"Name: package0-bindings\nVersion: 2.0\n\n{summary}\n")
    write_demo_corpus(arguments(tmp_path / "corpus"), [installation])
    documents = [d for s in ("train", "valid") for d in read(tmp_path / "corpus", f"prose.{s}")]
    names = [document.id for document in documents]
    assert len([name for name in names if "METADATA" in name and "/package0/" in name]) == 2
    assert len(names) == len(set(names))
