"""Conversations as the data pipeline makes training data of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.chat.encoder import ChatEncoder, open_chat_encoder
from data_pipeline.chat.options import ChatFault, ChatOptions
from data_pipeline.config import PipelineError

logger = logging.getLogger(__name__)

SHORTEST = {
    "messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}],
    "arguments": {},
}


@dataclass(frozen=True, kw_only=True)
class TrainingTurn:
    """The last answer of a conversation as training sees it."""

    prompt_ids: list[int]
    """What comes before it."""
    answer_ids: list[int]
    """The answer with the special token that ends the turn; the end of the document left out."""


def training_turns(
    tokenizer: Path, conversations: Sequence[Mapping[str, Any]], end_of_document: int
) -> list[TrainingTurn] | str:
    """Return the last turns of conversations in the tokens of training, or why there are none.

    Args:
        tokenizer: folder with tokenizer and chat template.
        conversations: `messages`, the last of them the assistant's, and `arguments` of the
            template.
        end_of_document: id that the pipeline adds after the last turn.
    """
    try:
        encoder = open_chat_encoder(tokenizer, ChatOptions(on_rewrite="split"))
        return [_last_turn(encoder, item, end_of_document) for item in conversations]
    except (ChatFault, PipelineError) as error:
        return f"the data pipeline makes no training data of conversations: {error}"


def end_of_turn(folder: Path, end_of_document: int) -> int | None:
    """Return the special token that ends an answer by a folder's chat template, if one does."""
    turns = training_turns(folder, [SHORTEST], end_of_document)
    if isinstance(turns, str):
        logger.warning("%s: no token ends an answer in chat: %s", folder, turns)
        return None
    return turns[0].answer_ids[-1]


def _last_turn(encoder: ChatEncoder, item: Mapping[str, Any], end_of_document: int) -> TrainingTurn:
    arguments = dict(item["arguments"])
    record = {"messages": item["messages"], "tools": arguments.pop("tools", None)}
    sample = encoder.encode({**record, "chat_template_kwargs": arguments})[-1]
    start = len(sample.ids) - sample.trained[::-1].index(False)
    answer = sample.ids[start:]
    if answer[-1] == end_of_document and len(answer) > 1:
        answer = answer[:-1]
    return TrainingTurn(prompt_ids=sample.ids[:start], answer_ids=answer)
