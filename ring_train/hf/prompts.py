"""Prompts as a server makes them, from a tokenizer folder and its own chat template.

Unusual: transformers is imported when a folder is opened, because it takes seconds and a run
without evaluation needs none of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from ring_train.hf.errors import HfError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROBE = "Probe7"
"""What a template is asked to write, to see what it writes after it; with letters of both cases."""
THINK, THINK_END = "<think>", "</think>"
RENDERING_ERRORS = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError)

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a model is given."""

    text: str
    ids: list[int]
    is_thinking: bool
    """It ends inside of reasoning that the answer has to close."""


class PromptTokenizer:
    """The tokenizer of a folder.

    Args:
        folder: Hugging Face folder.

    Raises:
        HfError: no tokenizer is in it, or it cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        from transformers import PreTrainedTokenizerFast

        self.folder = folder
        if not (Path(folder) / "tokenizer.json").is_file():
            raise HfError(f"tokenizer folder {folder} lacks tokenizer.json; give a complete one")
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        except Exception as error:  # tokenizers raises no narrower class
            raise HfError(
                f"tokenizer folder {folder} cannot be read ({type(error).__name__}: {error}); "
                "its tokenizer.json, tokenizer_config.json or chat_template.jinja is damaged: "
                "copy the folder again"
            ) from None
        self._tokenizer: PreTrainedTokenizerFast = tokenizer

    @property
    def num_ids(self) -> int:
        """Rows that an embedding must have."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def text_prompt(self, text: str) -> Prompt:
        """Return a text as it is; the document that begins with it has no further token."""
        return Prompt(text=text, ids=self._encode(text), is_thinking=False)

    def chat_prompt(self, messages: Messages, arguments: Mapping[str, Any]) -> Prompt:
        """Return messages rendered with the generation prompt.

        Args:
            messages: ends with the user's.
            arguments: further variables of the template.

        Raises:
            HfError: there is no template, or it refuses the messages.
        """
        text = self._render(messages, arguments, add_generation_prompt=True)
        bare = self._render(messages, arguments, add_generation_prompt=False)
        opening = text[_divergence(text, bare) :]
        return Prompt(
            text=text,
            ids=self._encode(text),
            is_thinking=opening.rfind(THINK) > opening.rfind(THINK_END),
        )

    def end_of_turn(self, arguments: Mapping[str, Any]) -> int | None:
        """Return the special token that the template writes after an answer, if it writes one.

        Raises:
            HfError: there is no template, or it writes no answer as it is.
        """
        turn = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}]
        text = self._render(turn, arguments, add_generation_prompt=False)
        if PROBE not in text:
            raise HfError(
                f"the chat template of {self.folder} writes an answer {PROBE!r} not as it is "
                f"({text[-60:]!r}), so what ends an answer cannot be found; correct the template, "
                "or set evaluation.prompt_format=text"
            )
        after = self._encode(text[text.rfind(PROBE) + len(PROBE) :])
        special = self._tokenizer.added_tokens_decoder
        return next((token for token in after if token in special and special[token].special), None)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included."""
        tokenizer: Any = self._tokenizer  # its result depends on the nesting of ids
        return tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _render(
        self, messages: Messages, arguments: Mapping[str, Any], *, add_generation_prompt: bool
    ) -> str:
        if self._tokenizer.chat_template is None:
            raise HfError(
                f"tokenizer folder {self.folder} has no chat template; give one with "
                "chat_template.jinja, or set evaluation.prompt_format=text"
            )
        tokenizer: Any = self._tokenizer  # its result depends on `tokenize`
        try:
            return tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **arguments,
            )
        except RENDERING_ERRORS as error:
            raise HfError(f"the chat template of {self.folder} says {str(error)!r}") from None


def _divergence(text: str, bare: str) -> int:
    """Return where `text` leaves `bare`, at the beginning of a mark of reasoning."""
    pairs = zip(text, bare, strict=False)  # the shorter ends it
    end = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    begin = text.rfind("<", 0, end)
    for mark in (THINK, THINK_END):
        if begin >= 0 and text.startswith(mark, begin) and begin + len(mark) > end:
            return begin
    return end
