"""`key=value` arguments."""

import dataclasses
import re
from pathlib import Path

import pytest

from data_pipeline import config as config_module
from data_pipeline.config import (
    PipelineError,
    compose,
    parse_arguments,
    presets,
    run_command,
)
from data_pipeline.curation.arguments import Compression, Curate
from data_pipeline.curation.chain import read_steps


@dataclasses.dataclass(kw_only=True)
class Example:
    input: str
    workers: int = 1


def test_values_are_typed_by_the_field() -> None:
    assert parse_arguments(Example, ["input=a=b", "workers=3"]) == Example(input="a=b", workers=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["input=a", "worker=3"], "'worker' is not a key; did you mean 'workers'"),
        (["input=a", "workers=two"], "workers=two is not a whole number"),
        (["workers=2"], "input must be given"),
        (["input=a", "input=b"], "'input' is given twice"),
        (["corpus.jsonl"], "not of the form key=value"),
    ],
)
def test_wrong_arguments_are_refused_with_the_way_out(arguments: list[str], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        parse_arguments(Example, arguments)


def test_a_command_that_fails_prints_one_message_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["command", "inptu=x"])
    assert run_command(Example, lambda arguments: None) == 2
    assert "did you mean 'input'" in capsys.readouterr().err


def composed(*words: str) -> Curate:
    return compose(Curate, words, root="curate", group="curation")


@pytest.mark.parametrize("preset", presets("curation"))
def test_every_preset_of_curation_is_a_chain_of_known_steps(preset: str, tmp_path: Path) -> None:
    config = composed(f"curation={preset}", "input=a", "output=b")
    for step in filter(None, config.steps.values()):
        if "evaluation" in step:  # a preset names files that only its user has
            step["evaluation"] = str(tmp_path / "evaluation.jsonl")
            (tmp_path / "evaluation.jsonl").write_text('{"text": "a b c"}\n')
    assert [named.name for named in read_steps(config.steps)] == list(config.steps)


def test_words_change_presets_in_place() -> None:
    config = composed(
        *("curation=light", "input=a,b/**", "output=c", "workers=3", "compression=zst"),
        *("steps.near_dedup.n_grams=7", "steps.exact_dedup=null", "steps.last.step=length"),
    )
    assert (config.input, config.workers) == ("a,b/**", 3)
    assert config.compression is Compression.zst
    assert config.steps == {
        "normalize": {},
        "exact_dedup": None,
        "near_dedup": {"n_grams": 7},
        "last": {"step": "length"},
    }


def test_a_preset_may_be_a_file_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("workers: 2\nsteps:\n  short: {step: length, min_characters: 5}\n")
    config = composed(f"curation={path}", "input=a", "output=b", "steps.short.min_characters=6")
    assert config.workers == 2
    assert config.steps == {"short": {"step": "length", "min_characters": 6}}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inptu=a"], "'inptu' is not a key; did you mean 'input'"),
        (["curation=wbe"], "curation=wbe is not a preset; did you mean 'web'"),
        (["input=a", "output=b"], "steps must be given; add steps=... or curation=NAME"),
        (["curation=light", "input=a"], "output must be given"),
        (["curation=light", "input=a", "output=b", "workers=two"], "'two'.*Integer"),
        (["curation=light", "input=a", "output=b", "workers=1,2"], "gives alternatives"),
        (["curation=light", "workers.two=1"], "workers holds one value"),
        (["curation=light", "input=a", "input=b"], "'input' is given twice"),
        (["corpus.jsonl"], "not of the form key=value"),
        (["curation=light", "input=a", "output=b", "compression=xz"], "xz"),
        (["curation=nowhere.yaml", "input=a", "output=b"], "nowhere.yaml: No such file"),
        (["curation={}/keys.yaml", "input=a", "output=b"], "step is not a key; did you mean 'ste"),
        (["curation={}/list.yaml", "input=a", "output=b"], "holds no mapping"),
        (["curation={}/broken.yaml", "input=a", "output=b"], "broken.yaml: while parsing"),
    ],
)
def test_wrong_words_and_files_are_refused_by_one_message(
    tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "keys.yaml").write_text("step: {}\n")
    (tmp_path / "list.yaml").write_text("- length\n")
    (tmp_path / "broken.yaml").write_text("steps: [\n")
    with pytest.raises(PipelineError, match=message) as caught:
        composed(*(word.replace("{}", str(tmp_path)) for word in words))
    assert "\n" not in str(caught.value)


def test_only_the_config_module_imports_hydra() -> None:
    importers = [
        path.name
        for path in Path(config_module.__file__).parent.rglob("*.py")
        if re.search(r"^\s*(from|import) (hydra|omegaconf)", path.read_text(), re.M)
    ]
    assert importers == ["config.py"]
