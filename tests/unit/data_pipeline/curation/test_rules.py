"""Steps that look at one document at a time."""

import dataclasses
import inspect
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from data_pipeline.config import PipelineError
from data_pipeline.curation import nodes
from data_pipeline.curation.rules import BLOCKS, Drop, build_rule
from data_pipeline.documents import Document
from tests.unit.data_pipeline.curation.corpora import prose

OTHER_PARAMETERS = {"exclusion_writer", "language", "domains"}
SENTENCES = "The cat sat on the mat with a hat. It was warm and that was good to have. "
LOG = "".join(f"On 2024-01-0{n % 9}, 12:0{n % 6}:11, rotation number 17 / 23\n" for n in range(60))
PLAIN = topics["exceptions"]


def verdict(step: nodes.Step, text: str, domain: str = "web") -> Document | Drop:
    return build_rule(step, Path())(Document("a", text, domain))


def edited(step: nodes.Step, text: str) -> str:
    result = verdict(step, text)
    assert isinstance(result, Document)
    return result.text


def test_normalize_gives_one_spelling() -> None:
    messy = "caf\u0065\u0301\r\nline\rlast\u2028end\x07\ttab\x85"
    once = edited(nodes.Normalize(), messy)
    assert once == "caf\u00e9\nline\nlast\nend\ttab\n"
    assert edited(nodes.Normalize(), once) == once


def test_normalize_does_only_what_is_asked() -> None:
    step = nodes.Normalize(form=nodes.UnicodeForm.none, newlines=False, control_characters=False)
    assert edited(step, "e\u0301\r\n\x07") == "e\u0301\r\n\x07"


def test_a_document_of_control_characters_is_emptied() -> None:
    assert verdict(nodes.Normalize(), "\x07\r\n\x08") == Drop("emptied")


def test_addresses_are_replaced_by_the_same_name_each_time() -> None:
    text = "write to jane.doe@corp.io or root@corp.io on 8.8.8.8, not on 10.0.0.1"
    assert edited(nodes.Pii(), text) == (
        "write to email@example.com or email@example.com on 22.214.171.124, not on 10.0.0.1"
    )


def test_lines_of_symbols_are_removed() -> None:
    assert edited(nodes.SymbolLines(), "a title\n=======\ntext") == "a title\ntext"


@pytest.mark.parametrize(
    ("step", "text", "reason"),
    [
        (nodes.Length(min_characters=5), "four", "too_short"),
        (nodes.Length(max_characters=5), "sixsix", "too_long"),
        (nodes.Regex(regex_exp="(?i)lorem"), "Lorem ipsum", "matched"),
        (nodes.GopherQuality(), "Only a few words.", "gopher_short_doc"),
        (nodes.GopherQuality(), LOG, "gopher_below_alpha_threshold"),
        (nodes.GopherQuality(), "perro gato casa " * 30, "gopher_enough_stop_words"),
        (nodes.GopherRepetition(), "Buy now, it is cheap.\n" * 20, "dup_line_frac"),
        (nodes.C4Quality(), SENTENCES * 3 + "{.", "curly_bracket"),
        (nodes.C4Quality(filter_no_terminal_punct=False), "One short line", "too_few_sentences"),
        (nodes.C4Paragraphs(), "short\nlines\nonly", "< 3 paragraphs"),
        (nodes.FinewebQuality(), "no end\n" * 20, "line_punct_ratio"),
        (nodes.Sample(fraction=0), "anything", "not_sampled"),
    ],
)
def test_filters_drop_with_their_reason(step: nodes.Step, text: str, reason: str) -> None:
    assert verdict(step, text) == Drop(reason)


@pytest.mark.parametrize(
    "step",
    [
        nodes.Length(min_characters=100),
        nodes.Regex(regex_exp="lorem ipsum"),
        nodes.GopherQuality(),
        nodes.GopherRepetition(),
        nodes.FinewebQuality(short_line_thr=1),
        nodes.Sample(),
    ],
)
def test_filters_keep_good_prose_unchanged(step: nodes.Step) -> None:
    assert edited(step, PLAIN) == PLAIN


def test_a_step_leaves_other_domains_alone() -> None:
    step = nodes.Length(min_characters=10, domains=["prose"])
    assert verdict(step, "short", "prose") == Drop("too_short")
    assert verdict(step, "short", "code") == Document("a", "short", "code")


def test_filters_read_the_messages_of_a_conversation() -> None:
    turns = [{"role": "user", "content": "caf\u0065\u0301"}, {"role": "assistant", "content": None}]
    document = Document("a", "", "chat", messages=turns)
    result = build_rule(nodes.Normalize(), Path())(document)
    assert isinstance(result, Document)
    assert result.messages == [{"role": "user", "content": "caf\u00e9"}, turns[1]]
    assert build_rule(nodes.Length(min_characters=6), Path())(document) == Drop("too_short")


def test_removing_lines_of_a_conversation_is_refused() -> None:
    turns = [{"role": "user", "content": SENTENCES * 3 + "\nno end here at all"}]
    with pytest.raises(PipelineError, match="not defined for a conversation"):
        build_rule(nodes.C4Quality(), Path())(Document("a", "", "chat", messages=turns))


def test_a_sample_is_nested_in_a_larger_one() -> None:
    names = [document.id for document in prose()]

    def sampled(fraction: float, seed: int = 1) -> set[str]:
        rule = build_rule(nodes.Sample(fraction=fraction, seed=seed), Path())
        return {n for n in names if isinstance(rule(Document(n, "x", "d")), Document)}

    assert sampled(0.2) < sampled(0.5) < sampled(0.8) < sampled(1) == set(names)
    assert 0.3 < len(sampled(0.5)) / len(names) < 0.7
    assert sampled(0.5) != sampled(0.5, seed=2)


@pytest.mark.parametrize("kind", [*BLOCKS, nodes.GopherRepetition])
def test_parameters_have_the_names_and_defaults_of_datatrove(kind: type[nodes.Step]) -> None:
    block: Any = BLOCKS.get(kind)
    if block is None:
        from datatrove.pipeline.filters import GopherRepetitionFilter as block
    theirs = inspect.signature(block.__init__).parameters
    ours: dict[str, Any] = {"regex_exp": "x"} if kind is nodes.Regex else {}
    for name, value in dataclasses.asdict(kind(**ours)).items():
        if name in OTHER_PARAMETERS or name in ours or name.endswith("_replacement"):
            continue
        default = theirs[name].default
        assert (tuple(value.items()) if isinstance(value, dict) else value) == default, name


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (nodes.Ftfy(), "install `ftfy`.*leave the step out"),
        (nodes.GopherQuality(language="en"), "language=en: Please install `spacy`.*language=words"),
        (nodes.GopherQuality(language="xyz"), "doesn't have a tokenizer assigned"),
        (nodes.Regex(regex_exp="("), "regex_exp is no regular expression"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(step: nodes.Step, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        build_rule(step, Path())
