"""What a step does to one document: datatrove's formatters and filters behind one signature."""

import dataclasses
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from datatrove.data import Document as DatatroveDocument
from datatrove.pipeline.filters import (
    C4ParagraphFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    RegexFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.formatters.base import BaseFormatter
from datatrove.pipeline.formatters.ftfy import FTFYFormatter
from datatrove.pipeline.formatters.pii import PIIFormatter
from datatrove.pipeline.formatters.symbol_lines_remover import SymbolLinesFormatter

from data_pipeline.config import PipelineError
from data_pipeline.curation import nodes
from data_pipeline.curation.contamination import ContaminationFilter
from data_pipeline.curation.words import word_tokenizer
from data_pipeline.documents import Document

NEWLINES = re.compile(r"\r\n|[\r\x85\u2028\u2029]")
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
EMPTIED = "emptied"
"""Reason of a document of which a formatter left no text."""


@dataclasses.dataclass(frozen=True, slots=True)
class Drop:
    """Why a document does not pass."""

    reason: str
    detail: str = ""
    """What was found, for whoever reads the dropped documents."""


type Rule = Callable[[Document], Document | Drop]
"""Returns the document, perhaps edited, or why it is dropped."""


def build_rule(step: nodes.Step, folder: Path) -> Rule:
    """Return the rule of a step that looks at one document at a time.

    Args:
        step: anything but the steps over the whole corpus.
        folder: where `prepare_step` put what the step needs.

    Raises:
        PipelineError: a package that the step needs is not installed, or a value is impossible.
    """
    try:
        block = _build_block(step, folder)
    except ImportError as error:
        raise PipelineError(f"{error} Or leave the step out") from None
    except re.error as error:
        raise PipelineError(f"regex_exp is no regular expression: {error}") from None
    rule = _format_rule(block) if isinstance(block, BaseFormatter) else _filter_rule(block)
    if not step.domains:
        return rule
    domains = frozenset(step.domains)
    return lambda document: rule(document) if document.domain in domains else document


def characters(document: Document) -> int:
    """Return the length of a document's text, or of all its messages."""
    if document.messages is None:
        return len(document.text)
    return sum(len(text) for text in _contents(document))


def text_of(document: Document) -> str:
    """Return the text that filters see: that of a conversation is its messages, by blank lines."""
    return document.text if document.messages is None else "\n\n".join(_contents(document))


class NormalizeFormatter(BaseFormatter):
    """One spelling of the same text. datatrove's own, ftfy, needs a package and guesses."""

    name = "normalize"

    def __init__(self, form: nodes.UnicodeForm, newlines: bool, control_characters: bool) -> None:
        super().__init__()
        self._form = form.value
        self._newlines = newlines
        self._control_characters = control_characters

    def format(self, text: str) -> str:
        """Return the normalized text; of a normalized text itself."""
        if self._newlines:
            text = NEWLINES.sub("\n", text)
        if self._control_characters:
            text = CONTROL_CHARACTERS.sub("", text)
        return text if self._form == "none" else unicodedata.normalize(self._form, text)  # type: ignore[arg-type]  # a form by its name


class LengthFilter(BaseFilter):
    """Keeps documents with a number of characters in a range."""

    name = "length"

    def __init__(self, min_characters: int, max_characters: int | None) -> None:
        super().__init__()
        self._min, self._max = min_characters, max_characters

    def filter(self, doc: DatatroveDocument) -> bool | tuple[bool, str]:
        """Return whether to keep the document, or (False, reason)."""
        if len(doc.text) < self._min:
            return False, "too_short"
        if self._max is not None and len(doc.text) > self._max:
            return False, "too_long"
        return True


class SampleFilter(BaseFilter):
    """Keeps documents whose hash is small. datatrove's draws depend on order and on workers."""

    name = "sample"

    def __init__(self, step: nodes.Sample) -> None:
        super().__init__()
        self._step = step

    def filter(self, doc: DatatroveDocument) -> bool | tuple[bool, str]:
        """Return whether to keep the document, or (False, reason)."""
        fraction = self._step.by_domain.get(doc.metadata["domain"], self._step.fraction)
        point = xxhash.xxh64_intdigest(f"{self._step.seed}:{doc.id}".encode()) / 2**64
        return True if point < fraction else (False, "not_sampled")


def _build_block(step: nodes.Step, folder: Path) -> BaseFormatter | BaseFilter:
    match step:
        case nodes.Normalize():
            return NormalizeFormatter(step.form, step.newlines, step.control_characters)
        case nodes.Length():
            return LengthFilter(step.min_characters, step.max_characters)
        case nodes.Sample():
            return SampleFilter(step)
        case nodes.Decontaminate():
            return ContaminationFilter(folder, step)
        case nodes.GopherRepetition():
            parameters = _parameters(step)
            for name in ("top_n_grams", "dup_n_grams"):
                parameters[name] = tuple(parameters[name].items())
            return GopherRepetitionFilter(**parameters)
    return BLOCKS[type(step)](**_parameters(step))


BLOCKS: dict[type[nodes.Step], Callable[..., BaseFormatter | BaseFilter]] = {
    nodes.Ftfy: FTFYFormatter,
    nodes.Pii: PIIFormatter,
    nodes.SymbolLines: SymbolLinesFormatter,
    nodes.Regex: RegexFilter,
    nodes.GopherQuality: GopherQualityFilter,
    nodes.C4Quality: C4QualityFilter,
    nodes.C4Paragraphs: C4ParagraphFilter,
    nodes.FinewebQuality: FineWebQualityFilter,
}
"""Steps whose parameters are those of a block of datatrove."""


def _parameters(step: nodes.Step) -> dict[str, Any]:
    """Return the parameters of the step's block."""
    fields = dataclasses.fields(step)
    values = {f.name: getattr(step, f.name) for f in fields if f.name != "domains"}
    if "language" in values:
        values["language"] = word_tokenizer(values["language"])
    return values


def _format_rule(block: BaseFormatter) -> Rule:
    def rule(document: Document) -> Document | Drop:
        if document.messages is None:
            edited = dataclasses.replace(document, text=block.format(document.text))
        else:
            edited = dataclasses.replace(
                document, messages=[_formatted(block, turn) for turn in document.messages]
            )
        return edited if text_of(edited).strip() else Drop(EMPTIED)

    return rule


def _filter_rule(block: BaseFilter) -> Rule:
    def rule(document: Document) -> Document | Drop:
        text = text_of(document)
        shown = DatatroveDocument(text, document.id, metadata={"domain": document.domain})
        kept, reason = get_filter_result(block.filter(shown))
        if not kept:
            return Drop(
                _reason(shown, reason or "matched"), shown.metadata.get("contaminated_ngram", "")
            )
        if shown.text == text:
            return document
        if document.messages is not None:
            raise PipelineError(
                "the step removes lines, which is not defined for a conversation; "
                "list the domains of plain text under its domains:"
            )
        return dataclasses.replace(document, text=shown.text) if shown.text else Drop(EMPTIED)

    return rule


def _reason(document: DatatroveDocument, reason: str) -> str:
    task = document.metadata.get("contaminated_task")
    return reason if task is None else f"{reason}: {task}"


def _formatted(block: BaseFormatter, turn: dict[str, Any]) -> dict[str, Any]:
    content = turn.get("content")
    return {**turn, "content": block.format(content)} if isinstance(content, str) else turn


def _contents(document: Document) -> list[str]:
    turns = document.messages or []
    return [turn["content"] for turn in turns if isinstance(turn.get("content"), str)]
