"""`key=value` arguments."""

import dataclasses

import pytest

from data_pipeline.config import PipelineError, parse_arguments, run_command


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
