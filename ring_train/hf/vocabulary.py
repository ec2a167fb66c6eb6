"""Embedding and lm_head with more or fewer rows.

New rows start from the mean of the rows of the old ids (J. Hewitt, "Initializing New Word
Embeddings for Pretrained Language Models", 2021): with n old and k new ids no old id loses more
than log(1 + k/n) of its log-probability, because the exponential of a mean is at most the mean of
exponentials.

Unusual: rows of padding, which no id of the tokenizer has, are neither old rows nor kept when an id
of the new tokenizer takes them: training has only ever pushed their logits down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from ring_train.config import ModelConfig, NewRows
from ring_train.hf.errors import HfError
from ring_train.ops.drawing import named_generator

VOCABULARY_TENSORS = ("embedding.word_embeddings.weight", "output_layer.weight")
TOKENIZER = "tokenizer.json"
BLOCK_ROWS = 4096
"""Rows that are fp64 at a time."""


@dataclass(frozen=True, kw_only=True)
class VocabularyChange:
    """Which rows there were and will be."""

    old_rows: int
    new_rows: int
    old_ids: int
    """Ids of the old tokenizer, all below this; the rows beyond are padding."""
    new_ids: int
    """Ids of the new tokenizer."""

    @property
    def is_any(self) -> bool:
        """Whether a row differs."""
        return (self.old_rows, self.old_ids) != (self.new_rows, self.new_ids)


def make_vocabulary_change(
    model: ModelConfig, rows: int, tokenizer: Path, new_tokenizer: Path
) -> VocabularyChange:
    """Return the change of a model to `rows` rows and another tokenizer.

    Raises:
        HfError: a tokenizer cannot be read, the new one gives old tokens other ids, an id would
            have no row, or the head is normalised over the vocabulary.
    """
    old, new = _read_ids(tokenizer), _read_ids(new_tokenizer)
    moved = sorted(((i, token) for token, i in old.items() if new.get(token) != i))
    if moved:
        number, token = moved[0]
        raise HfError(
            f"tokenizer={new_tokenizer} gives {len(moved)} tokens of {tokenizer} another id or "
            f"none, first {token!r}: {number} becomes {new.get(token)}; rows would change their "
            "meaning: give a tokenizer that only adds tokens"
        )
    change = VocabularyChange(
        old_rows=model.vocab_size,
        new_rows=rows,
        old_ids=max(old.values()) + 1,
        new_ids=max(new.values()) + 1,
    )
    if change.is_any and model.norm_head:
        raise HfError(
            "norm_head=true divides lm_head by its norm over the vocabulary, so that other rows "
            "change all logits; keep vocab_size and tokenizer"
        )
    special = (model.eos_token_id, model.pad_token_id, model.bos_token_id or 0)
    largest = max(change.new_ids - 1, *special)
    if largest >= rows:
        raise HfError(
            f"vocab_size={rows} has no row for token id {largest} of {new_tokenizer}; only rows "
            f"of padding can go: give at least {largest + 1}"
        )
    return change


def _read_ids(folder: Path) -> dict[str, int]:
    """Return {token: id} of a tokenizer's folder."""
    path = folder / TOKENIZER
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8")).get_vocab()
    except Exception as error:  # the library raises bare Exceptions
        raise HfError(f"{path} cannot be read ({error}); give a tokenizer's folder") from None


def with_vocabulary(
    read: Callable[[str], Tensor], change: VocabularyChange, *, new_rows: NewRows, seed: int
) -> Callable[[str], Tensor]:
    """Return a reader of the tensors of a model whose vocabulary has changed.

    Args:
        read: from the trainer's name of a tensor to the whole tensor.
        change: of its rows.
        new_rows: what rows of new ids start from.
        seed: of what is drawn.
    """

    def read_changed(name: str) -> Tensor:
        tensor = read(name)
        if name not in VOCABULARY_TENSORS or not change.is_any:
            return tensor
        generator = named_generator(seed, name) if new_rows is NewRows.normal else None
        return change_rows(tensor, change, generator)

    return read_changed


def change_rows(
    rows: Tensor, change: VocabularyChange, generator: torch.Generator | None
) -> Tensor:
    """Return [new_rows, h] from [old_rows, h]; rows of old ids and of lasting padding stay.

    Args:
        rows: of the embedding or of lm_head.
        change: which rows there will be.
        generator: draws new rows around the mean; None = they are the mean.
    """
    changed = rows.new_empty((change.new_rows, rows.shape[1]))
    kept = min(change.old_rows, change.new_rows)
    changed[:kept] = rows[:kept]
    mean, variance = _moments(rows[: change.old_ids])
    taken = (change.old_ids, min(change.new_ids, change.old_rows))
    for first, last in (taken, (change.old_rows, change.new_rows)):
        new = changed[first:last]
        new[:] = mean
        if generator is not None and len(new):
            noise = torch.empty(new.shape).normal_(generator=generator)
            new[:] = mean + noise * variance.sqrt()
    return changed


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each channel, fp64."""
    blocks = rows.split(BLOCK_ROWS)
    mean = torch.stack([block.double().sum(0) for block in blocks]).sum(0) / len(rows)
    squares = torch.stack([(block.double() - mean).square().sum(0) for block in blocks]).sum(0)
    return mean, squares / len(rows)
