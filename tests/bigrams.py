"""Weights with which a model writes what a table of bigrams says, whatever came before.

Layers add nothing to the residual stream, so the hidden state is the embedding of the last token,
and the output layer looks for its successor. The tiny model so gives answers that can be graded.
"""

import itertools

import torch

SHARPNESS = 1.5
"""Of the successor's logit over the others': probability 0.98 or so at a hidden size of 64."""
ADDING = ("linear_proj.weight", "linear_fc2.weight", "dense.weight", "down_proj.weight")
"""Endings of names whose tensors add to the residual stream; ours and Hugging Face's."""


def bigram_embedding(vocab_size: int, hidden_size: int) -> torch.Tensor:
    """Return unit rows in directions of their own, [v, h]."""
    rows = torch.randn(vocab_size, hidden_size, generator=torch.Generator().manual_seed(0))
    return rows / rows.norm(dim=1, keepdim=True)


def bigram_output(embedding: torch.Tensor, successors: dict[int, int]) -> torch.Tensor:
    """Return the rows of the output layer, [v, h]."""
    rows = torch.zeros_like(embedding)
    for token, successor in successors.items():
        rows[successor] += SHARPNESS * embedding[token]
    return rows


def chain(ids: list[int]) -> dict[int, int]:
    """Return the table that writes ids[1:] after ids[0]; no id may come twice."""
    assert len(set(ids)) == len(ids), "an id with two successors"
    return dict(itertools.pairwise(ids))
