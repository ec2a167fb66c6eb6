"""Prompts are what a server makes, and what training puts before an answer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from ring_train.hf.errors import HfError
from ring_train.hf.prompts import PromptTokenizer
from tests.unit.data_pipeline.chat.shapes import SHAPES, encoder_of, messages_of, write_shapes

SERVED = ("demo", "ours", "chatml", "llama", "stripped", "opened")
THOUGHT = "<think>\nab\n</think>\n\n12"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Shape of template -> tokenizer folder."""
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.mark.parametrize("shape", SERVED)
@pytest.mark.parametrize(
    "contents", [("12?",), ("12?", THOUGHT, "\nab 1 2"), ("\u00e9\u4e2d <|x|>\n\n", THOUGHT, "c")]
)
@pytest.mark.parametrize("system", ["", "Be brief.\n"])
def test_a_prompt_is_what_training_puts_before_the_answer(
    shape: str, contents: tuple[str, ...], system: str, folders: dict[str, Path]
) -> None:
    messages = messages_of(*contents, system=system)
    prompt = PromptTokenizer(folders[shape]).chat_prompt(messages, {})
    answered = [*messages, {"role": "assistant", "content": THOUGHT}]
    sample = encoder_of(folders[shape], on_rewrite="split").encode({"messages": answered})[-1]
    trained = "".join("1" if bit else "0" for bit in sample.trained)
    start = trained.rindex("01") + 1
    assert prompt.ids == sample.ids[:start]


def test_variables_reach_the_template_as_in_training(folders: dict[str, Path]) -> None:
    tokenizer = PromptTokenizer(folders["ours"])
    messages = messages_of("12?")
    on, off = ({"enable_thinking": thinking} for thinking in (True, False))
    assert "thinking on" in tokenizer.chat_prompt(messages, on).text
    assert "thinking off" in tokenizer.chat_prompt(messages, off).text
    answered = [*messages, {"role": "assistant", "content": "12"}]
    sample = encoder_of(folders["ours"], template_arguments=on).encode({"messages": answered})[0]
    prompt = tokenizer.chat_prompt(messages, on)
    assert prompt.ids == sample.ids[: len(prompt.ids)]
    assert not sample.trained[len(prompt.ids) - 1]
    assert sample.trained[len(prompt.ids)]


@pytest.mark.parametrize("shape", SERVED)
def test_the_token_that_ends_an_answer_is_found(shape: str, folders: dict[str, Path]) -> None:
    tokenizer = PromptTokenizer(folders[shape])
    end = tokenizer.end_of_turn({})
    assert end is not None
    assert tokenizer.decode([end]) == SHAPES[shape][1]


def test_a_template_without_such_a_token_has_none(folders: dict[str, Path], tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    folder = with_template(folders["ours"], tmp_path / "plain", template)
    assert PromptTokenizer(folder).end_of_turn({}) is None


def test_a_token_of_text_ends_no_answer(folders: dict[str, Path], tmp_path: Path) -> None:
    """`</tool_call>` is a token of its own, but not a special one."""
    template = "{% for m in messages %}{{ m.content + '</tool_call><|role_end|>' }}{% endfor %}"
    tokenizer = PromptTokenizer(with_template(folders["ours"], tmp_path / "text", template))
    end = tokenizer.end_of_turn({})
    assert end is not None
    assert tokenizer.decode([end]) == "<|role_end|>"


@pytest.mark.parametrize("shape", SERVED)
def test_only_a_prompt_that_opens_the_reasoning_is_thinking(
    shape: str, folders: dict[str, Path]
) -> None:
    tokenizer = PromptTokenizer(folders[shape])
    for text in ("12?", "<think>?", "</think>"):
        prompt = tokenizer.chat_prompt(messages_of(text), {})
        assert prompt.is_thinking == (shape == "opened"), text


@pytest.mark.parametrize(
    ("opening", "is_thinking"),
    [("<think>", True), ("", False), ("</think>", False), ("<|x|>", False)],
)
def test_a_template_may_end_what_has_no_generation_prompt(
    opening: str, is_thinking: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}"
    template += opening + "{% else %}<|role_end|>{% endif %}"
    tokenizer = PromptTokenizer(with_template(folders["ours"], tmp_path / "ending", template))
    for text in ("12?", "<think>?", "<think>", "</think>"):
        prompt = tokenizer.chat_prompt(messages_of(text), {})
        assert prompt.text == text + opening
        assert prompt.is_thinking == is_thinking, text


def test_a_template_that_changes_content_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    template = "{% for m in messages %}{{ m.content | upper + '<|role_end|>' }}{% endfor %}"
    tokenizer = PromptTokenizer(with_template(folders["ours"], tmp_path / "upper", template))
    with pytest.raises(HfError, match=r"upper writes an answer 'Probe7' not as it is .*PROBE7"):
        tokenizer.end_of_turn({})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_a_damaged_folder_is_named(
    name: str, content: bytes, folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["ours"], tmp_path / "damaged")
    (tmp_path / "damaged" / name).write_bytes(content)
    with pytest.raises(HfError, match=r"damaged cannot be read .*copy the folder again"):
        PromptTokenizer(tmp_path / "damaged")


def test_a_text_is_its_own_prompt(folders: dict[str, Path]) -> None:
    tokenizer = PromptTokenizer(folders["llama"])
    prompt = tokenizer.text_prompt("ab 12\n")
    assert tokenizer.decode(prompt.ids) == prompt.text == "ab 12\n"
    assert not prompt.is_thinking


def test_no_token_is_added_to_what_is_rendered(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "bos"
    shutil.copytree(folders["ours"], folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = "<|startoftext|>"
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    plain, adding = (PromptTokenizer(path) for path in (folders["ours"], folder))
    messages = messages_of("12?")
    assert adding.chat_prompt(messages, {}).ids == plain.chat_prompt(messages, {}).ids
    assert adding.text_prompt("12?").ids == plain.text_prompt("12?").ids


def with_template(folder: Path, target: Path, template: Any) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def test_folders_that_cannot_make_prompts_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(HfError, match=r"lacks tokenizer\.json"):
        PromptTokenizer(tmp_path)
    mute = PromptTokenizer(with_template(folders["ours"], tmp_path / "mute", None))
    with pytest.raises(HfError, match=r"has no chat template; .* evaluation.prompt_format=text"):
        mute.chat_prompt(messages_of("12?"), {})
    strict = with_template(folders["ours"], tmp_path / "strict", "{{ raise_exception('no') }}")
    with pytest.raises(HfError, match=r"the chat template of .*strict says 'no'"):
        PromptTokenizer(strict).chat_prompt(messages_of("12?"), {})
