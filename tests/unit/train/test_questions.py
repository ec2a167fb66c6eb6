"""Problems become prompts of the model's tokenizer, or are refused with their place."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

import ring_train.platform  # noqa: F401  (before the first import of megatron-core)
from ring_train.config import compose
from ring_train.errors import UserError
from ring_train.hf.prompts import PromptTokenizer
from ring_train.plan import Plan, make_plan
from ring_train.train.questions import make_questions
from tests.unit.data_pipeline.chat.shapes import write_shapes


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shape of template -> tokenizer folder."""
    return write_shapes(tmp_path_factory.mktemp("shapes"))


def plan_of(tokenizer: Path, file: Path, *words: str) -> Plan:
    given = ["model=tiny", f"data.tokenizer={tokenizer}", f"evaluation.problems.math={file}"]
    return make_plan(compose("pretrain", [*given, "evaluation.max_new_tokens=64", *words]), 1)


def write(path: Path, *records: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


SYSTEM = {"role": "system", "content": "ab"}
USER = {"role": "user", "content": "1+1?"}
PLAIN = {"problem": "12?", "answer": "12"}


def test_the_instruction_follows_the_last_message(shapes: dict[str, Path], tmp_path: Path) -> None:
    file = write(tmp_path / "x", PLAIN, {"messages": [SYSTEM, USER], "answer": "2"})
    plan = plan_of(shapes["chatml"], file, "evaluation.instruction=box it")
    found = make_questions(plan)
    texts = [question.prompt.text for question in found.questions]
    assert texts[0] == "<|im_start|>user\n12?\nbox it<|im_end|>\n<|im_start|>assistant\n"
    assert texts[1].startswith("<|im_start|>system\nab<|im_end|>\n<|im_start|>user\n1+1?\nbox it<")
    (end,) = set(found.stop_tokens) - {plan.config.model.eos_token_id}
    assert PromptTokenizer(shapes["chatml"]).decode([end]) == "<|im_end|>"


def test_a_text_ends_with_the_models_token_alone(shapes: dict[str, Path], tmp_path: Path) -> None:
    words = ["evaluation.prompt_format=text", "evaluation.num_problems=1"]
    plan = plan_of(shapes["chatml"], write(tmp_path / "x", PLAIN, PLAIN), *words)
    found = make_questions(plan)
    assert [question.prompt.text for question in found.questions] == ["12?"]
    assert found.stop_tokens == (plan.config.model.eos_token_id,)


def test_bad_problems_are_named_together(shapes: dict[str, Path], tmp_path: Path) -> None:
    long, strange = {**PLAIN, "problem": "ab " * 9000}, {**PLAIN, "answer": "1 + " * 600}
    file = write(tmp_path / "x", PLAIN, long, strange)
    with pytest.raises(UserError) as caught:
        make_questions(plan_of(shapes["ours"], file))
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{file}:2: the prompt has ")
    assert "evaluation.max_new_tokens=64 leaves 4032 of the model's context of 4096" in first
    assert second.startswith(f"{file}:3: answer='1 + 1 + ")
    assert "cannot be compared: longer than 2000 characters; write a number" in second
    chat = write(tmp_path / "y", {"messages": [USER], "answer": "2"})
    with pytest.raises(UserError, match=r"y:1: has messages, which evaluation.prompt_format=text"):
        make_questions(plan_of(shapes["ours"], chat, "evaluation.prompt_format=text"))


def test_a_tokenizer_of_another_model_is_refused(shapes: dict[str, Path], tmp_path: Path) -> None:
    words = ["model.vocab_size=300", *(f"model.{x}_token_id=1" for x in ("bos", "eos", "pad"))]
    plan = plan_of(shapes["ours"], write(tmp_path / "x", PLAIN), *words)
    with pytest.raises(UserError, match=r"ours has \d+ ids, more than model.vocab_size=300; give"):
        make_questions(plan)


def test_answers_without_a_value_are_a_warning(
    shapes: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write(tmp_path / "x", PLAIN, {**PLAIN, "answer": r"10\%"})
    with caplog.at_level(logging.WARNING):
        make_questions(plan_of(shapes["ours"], file))
    (record,) = caplog.records
    assert "no value in 1 expected answers, so only the same text is right" in record.message
    assert f"{file}:2" in record.message


def test_a_template_without_an_end_is_a_warning(
    shapes: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "endless"
    shutil.copytree(shapes["ours"], folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.content + '.' }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    plan = plan_of(folder, write(tmp_path / "x", PLAIN))
    with caplog.at_level(logging.WARNING):
        found = make_questions(plan)
    assert found.stop_tokens == (plan.config.model.eos_token_id,)
    (record,) = caplog.records
    assert "endless writes no special token after an answer: only model.eos" in record.message


@pytest.mark.parametrize(
    ("words", "is_same"),
    [
        (["evaluation.max_batch_size=3", "evaluation.interval_steps=7"], True),
        (["evaluation.num_problems=2"], True),
        (["evaluation.num_problems=1"], False),
        (["evaluation.num_samples=2"], False),
        (["evaluation.temperature=0.5"], False),
        (["evaluation.top_p=0.5"], False),
        (["evaluation.max_new_tokens=65"], False),
        (["evaluation.prompt_format=text"], False),
        (["evaluation.instruction=x"], False),
        (["evaluation.template_arguments={enable_thinking: true}"], False),
    ],
)
def test_what_changes_figures_changes_the_digest(
    words: list[str], is_same: bool, shapes: dict[str, Path], tmp_path: Path
) -> None:
    file = write(tmp_path / "x", PLAIN, {**PLAIN, "answer": "7"})
    first = make_questions(plan_of(shapes["ours"], file)).digest
    other = make_questions(plan_of(shapes["ours"], file, *words)).digest
    assert (first == other) == is_same
    write(file, PLAIN, {**PLAIN, "answer": "8"})
    assert make_questions(plan_of(shapes["ours"], file)).digest != first
