"""Document boundaries of a packed row: their checks, and the document of every token."""

from itertools import pairwise

import torch
from jaxtyping import Int
from torch import Tensor


def document_lengths(
    cu_seqlens: Int[Tensor, " boundaries"], num_tokens: int, lengths: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Return the length in tokens of every document, each >= 1, together `num_tokens`.

    Args:
        cu_seqlens: [documents + 1], from 0 to `num_tokens`, strictly increasing.
        num_tokens: tokens of the packed row.
        lengths: a host copy of the lengths. With it a `cu_seqlens` off the CPU is not read (no
            device sync); on the CPU both must agree.

    Raises:
        ValueError: the boundaries are not those of `num_tokens` tokens.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype} are not boundaries; pass "
            "[documents + 1] integers"
        )
    if lengths is None or cu_seqlens.device.type == "cpu":
        boundaries = cu_seqlens.tolist()
        _check_boundaries(boundaries, num_tokens)
        found = tuple(end - start for start, end in pairwise(boundaries))
        if lengths is not None and tuple(lengths) != found:
            raise ValueError(
                f"lengths={lengths} differ from those of cu_seqlens={boundaries}; pass the "
                "differences of cu_seqlens, or None"
            )
        return found
    documents = cu_seqlens.numel() - 1
    if not lengths or len(lengths) != documents or min(lengths) < 1 or sum(lengths) != num_tokens:
        raise ValueError(
            f"lengths={lengths} are not {documents} documents of at least one token "
            f"and {num_tokens} tokens together; pass the differences of cu_seqlens, or None"
        )
    return tuple(lengths)


def document_indices(
    cu_seqlens: Int[Tensor, " boundaries"], num_tokens: int
) -> Int[Tensor, " {num_tokens}"]:
    """Return the 0-based document of every token, int64, on the device of `cu_seqlens`."""
    tokens = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens, tokens, right=True) - 1


def _check_boundaries(boundaries: list[int], num_tokens: int) -> None:
    increasing = all(a < b for a, b in pairwise(boundaries))
    if len(boundaries) < 2 or boundaries[0] != 0 or boundaries[-1] != num_tokens or not increasing:
        raise ValueError(
            f"cu_seqlens={boundaries} does not rise strictly from 0 to {num_tokens} tokens; give "
            "every document at least one token and end at the length of the row"
        )
