import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from ring_train.config import GenerateConfig, WeightFormat
from ring_train.hf.config import read_model_config
from ring_train.hf.continuation import continue_prompt
from ring_train.hf.errors import HfError
from ring_train.hf.reader import open_hf_folder
from ring_train.hf.writer import HfFormat, write_hf_folder
from ring_train.jobs import generate
from tests.unit.hf.conftest import GOLDEN


def continued(folder: Path, **fields: Any) -> str:
    config = GenerateConfig(hf_dir=str(folder), prompt="ab", max_new_tokens=8)
    return continue_prompt(dataclasses.replace(config, **fields))


def test_the_command_prints_the_prompt_and_what_follows(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"hf_dir={exported['ring_linear_v2']}", "prompt='once upon'", "max_new_tokens=5"]
    monkeypatch.setattr(sys, "argv", ["generate", *words])
    generate.main()
    out = capsys.readouterr().out
    assert out.startswith("once upon")
    assert len(out) > len("once upon\n")


def test_the_seed_decides_and_zero_temperature_does_not_care(exported: dict[str, Path]) -> None:
    folder = exported["ling_v2"]
    texts = [continued(folder, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = [continued(folder, seed=seed, temperature=0.0) for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_nearly_no_probability_mass_is_greedy(exported: dict[str, Path]) -> None:
    folder = exported["ling_v2"]
    assert continued(folder, top_p=1e-6) == continued(folder, temperature=0.0)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"prompt": ""}, "has no token"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"top_p": 0.0}, "top_p must be above 0"),
    ],
)
def test_bad_requests_are_refused(
    exported: dict[str, Path], fields: dict[str, Any], match: str
) -> None:
    with pytest.raises(HfError, match=match):
        continued(exported["ling_v2"], **fields)


def test_a_folder_without_modeling_files_is_refused() -> None:
    with pytest.raises(HfError, match="has no auto_map"):
        continued(GOLDEN / "ling_v2")


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HfError, match="does not exist"):
        continued(tmp_path)


def test_the_chat_template_lays_out_turns_as_the_family_does(exported: dict[str, Path]) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(exported["ling_v2"])
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "\n<think>\nfoo\n</think>\n\nb"},
        {"role": "user", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<role>SYSTEM</role>Be brief.\ndetailed thinking off<|role_end|>"
        "<role>HUMAN</role>a<|role_end|><role>ASSISTANT</role>b<|role_end|>"
        "<role>HUMAN</role>c<|role_end|><role>ASSISTANT</role>"
    )
    on = tokenizer.apply_chat_template(turns[1:2], tokenize=False, enable_thinking=True)
    assert on == (
        "<role>SYSTEM</role>detailed thinking on<|role_end|><role>HUMAN</role>a<|role_end|>"
    )


def test_a_tokenizers_own_chat_template_is_kept(exported: dict[str, Path], tmp_path: Path) -> None:
    from ring_train.hf import writer

    own = tmp_path / "tokenizer"
    shutil.copytree(GOLDEN / "ling_v2", own)
    path = own / "tokenizer_config.json"
    path.chmod(0o644)
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "mine"}))
    (tmp_path / "out").mkdir()
    writer._copy_files(tmp_path / "out", own, read_model_config(exported["ling_v2"]))
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


RUN = "open({path!r}, 'w').close()\n"
"""Python that leaves a trace."""


def test_python_that_is_not_ours_runs_only_if_asked_for(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    folder, trace = tmp_path / "folder", tmp_path / "trace"
    shutil.copytree(exported["ling_v2"], folder)
    path = folder / "configuration_bailing_moe_v2.py"
    path.write_text(RUN.format(path=str(trace)) + path.read_text())
    with pytest.raises(HfError, match=r"not ring_train's own: configuration_bailing_moe_v2\.py;"):
        continued(folder)
    assert not trace.exists()
    continued(folder, trust_remote_code=True)
    assert trace.exists()


@pytest.mark.parametrize("name", ["custom_generate/generate.py", "extra.py", "deep/er/x.so"])
def test_code_that_no_config_names_is_refused(
    exported: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder, trace = tmp_path / "folder", tmp_path / "trace"
    shutil.copytree(exported["ling_v2"], folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(RUN.format(path=str(trace)) + "def generate(*a, **k): pass")
    with pytest.raises(HfError, match=f"not ring_train's own: {name};"):
        continued(folder)
    assert not trace.exists()


def test_block_fp8_is_continued(tmp_path: Path) -> None:
    folder = tmp_path / "fp8"
    model = read_model_config(GOLDEN / "ling_v2")
    with open_hf_folder(GOLDEN / "ling_v2", model) as reader:
        form = HfFormat(weights=WeightFormat.fp8)
        write_hf_folder(
            folder, model, reader.read_logical, form=form, tokenizer_dir=GOLDEN / "ling_v2"
        )
    assert len(continued(folder)) > len("ab")


@pytest.mark.parametrize(
    "place", ["other_file.BailingMoeV2Config", "other/repository--configuration.Config"]
)
def test_an_auto_map_to_elsewhere_is_refused(
    exported: dict[str, Path], tmp_path: Path, place: str
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(exported["ling_v2"], folder)
    raw = json.loads((folder / "config.json").read_text())
    raw["auto_map"]["AutoConfig"] = place
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(HfError, match=r"would run .* auto_map="):
        continued(folder)


def test_no_other_command_runs_or_unpickles_what_lies_in_a_folder(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    """Config, tokenizer and weights are read past a hostile Python file and a hostile pickle."""
    from ring_train.hf.prompts import PromptTokenizer

    folder, trace = tmp_path / "folder", tmp_path / "trace"
    shutil.copytree(exported["ling_v2"], folder)
    for path in folder.glob("*.py"):
        path.write_text(RUN.format(path=str(trace)))
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {trace}'\ntR.".encode())
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    raw["auto_map"] = {"AutoTokenizer": ["modeling_bailing_moe_v2.X", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(raw))
    with open_hf_folder(folder, read_model_config(folder)) as reader:
        for name in reader.table:
            reader.read_logical(name)
    assert PromptTokenizer(folder).text_prompt("ab").ids
    assert not trace.exists()
