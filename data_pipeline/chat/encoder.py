"""Conversations to token ids with a loss mask: HF `tokenizers`, one piece of text at a time.

Each answer is encoded apart from what is before it, because a model writes it so; everything before
it must then equal, id by id, what a server makes of the prompt's text in one go.
"""

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data_pipeline.chat.conversations import read_conversation
from data_pipeline.chat.options import ChatFault, ChatOptions
from data_pipeline.chat.template import ChatTemplate, read_chat_template
from data_pipeline.chat.turns import Turn, cut_turns
from data_pipeline.config import PipelineError
from data_pipeline.special_tokens import EOS

PARTS = ("x", "y z")
"""A tokenizer must make of these, apart, what they are together."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One document of a shard."""

    ids: list[int]
    """Ends with end-of-text."""
    trained: list[bool]
    """Of each id, whether it is worth predicting."""
    num_turns: int
    """Of the assistant, that are trained."""
    turn: int | None
    """Number of its one message if the conversation was split; None for a whole one."""


class ChatEncoder:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, options: ChatOptions) -> None:
        """Take a tokenizer that sees special tokens in text and neither cuts nor pads."""
        eos = tokenizer.token_to_id(EOS)
        assert eos is not None, "read_tokenizer_record refuses such a tokenizer"
        self._tokenizer, self._template, self._options = tokenizer, template, options
        self._eos = eos
        self._special = _special_pattern(tokenizer)
        self._renamed = {} if template.names_observation else {"observation": "tool"}

    def encode(self, record: dict[str, Any]) -> list[Sample]:
        """Return the samples of a record: one, or as many as turns if it had to be split.

        Raises:
            ChatFault: it is no conversation, or the template does not render it as it must.
        """
        conversation = read_conversation(record, self._options.template_arguments, self._special)
        for message in conversation.messages:
            message["role"] = self._renamed.get(message["role"], message["role"])
        text, turns = cut_turns(conversation, self._template, self._special)
        refusal = _rewrite_of(turns)
        if refusal is None:
            whole = self._whole(text, turns)
            if isinstance(whole, Sample):
                return [whole]
            refusal = whole
        if self._options.on_rewrite == "refuse":
            raise refusal
        return [self._alone(turn) for turn in turns]

    def _whole(self, text: str, turns: list[Turn]) -> Sample | ChatFault:
        """Return the sample of a whole conversation, or which prompt it does not repeat."""
        ids: list[int] = []
        trained: list[bool] = []
        at = 0
        for number, turn in enumerate(turns):
            ids += self._ids(text[at : len(turn.prompt)])
            trained += itertools.repeat(False, len(ids) - len(trained))
            if number and ids != (prompt := self._ids(turn.prompt)):
                return _other_ids(turn, ids, prompt)
            ids += self._ids(turn.answer)
            trained += itertools.repeat(True, len(ids) - len(trained))
            at = len(turn.prompt) + len(turn.answer)
        return self._ended(ids, trained, len(turns), None)

    def _alone(self, turn: Turn) -> Sample:
        prompt, answer = self._ids(turn.prompt), self._ids(turn.answer)
        trained = [False] * len(prompt) + [True] * len(answer)
        return self._ended(prompt + answer, trained, 1, turn.number)

    def _ended(self, ids: list[int], trained: list[bool], turns: int, turn: int | None) -> Sample:
        if ids[-1] != self._eos:
            ids, trained = [*ids, self._eos], [*trained, True]
        return Sample(ids, trained, turns, turn)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids


def open_chat_encoder(folder: Path, options: ChatOptions) -> ChatEncoder:
    """Return the encoder of a tokenizer's folder.

    Raises:
        PipelineError: no tokenizer or template there, or one that cannot encode text in parts.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # what tokenizers raises for any bad file
        raise PipelineError(f"{path} is not a tokenizer ({error}); train or copy one") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    parts = [tokenizer.encode(part, add_special_tokens=False).ids for part in PARTS]
    text = tokenizer.decode([*parts[0], *parts[1]], skip_special_tokens=False)
    if text != "".join(PARTS):
        raise PipelineError(
            f"{path} makes {text!r} of the parts {PARTS}; format=chat encodes turns apart: give a "
            "tokenizer that puts nothing before a text, e.g. byte-level BPE without prefix space"
        )
    return ChatEncoder(tokenizer, read_chat_template(folder), options)


def _special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    added = tokenizer.get_added_tokens_decoder().values()
    contents = {token.content for token in added if token.special} | {EOS}
    longest_first = sorted(contents, key=lambda content: (-len(content), content))
    return re.compile("|".join(map(re.escape, longest_first)))


def _rewrite_of(turns: list[Turn]) -> ChatFault | None:
    for turn in turns:
        if turn.rewrite is not None:
            return ChatFault(
                "rewritten",
                f"has message {turn.number}, which the chat template rewrites when more follows: "
                f"{turn.rewrite}; on_rewrite=split makes a sample of each assistant turn",
            )
    return None


def _other_ids(turn: Turn, ids: list[int], prompt: list[int]) -> ChatFault:
    pairs = itertools.zip_longest(ids, prompt)
    at = next(number for number, (one, other) in enumerate(pairs) if one != other)
    return ChatFault(
        "other_prompt_ids",
        f"has message {turn.number}, whose prompt has other ids in one go than after the turns "
        f"before it, from id {at} on; on_rewrite=split makes a sample of each assistant turn",
    )
