"""What every backend of lightning attention gets, checked."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ring_train.ops.documents import document_lengths
from ring_train.ops.precision import compute_dtype


class LightningInputs(NamedTuple):
    """The arguments of `lightning_attention` that change its result."""

    q: Float[Tensor, "t n d"]
    k: Float[Tensor, "t n d"]
    v: Float[Tensor, "t n dv"]
    slopes: Float[Tensor, " n"]
    cu_seqlens: Int[Tensor, " boundaries"]
    lengths: tuple[int, ...] | None
    """Tokens of each document; not None once checked."""
    scale: float
    initial_state: Float[Tensor, "states n d dv"] | None
    initial_documents: tuple[int, ...] | None
    """Documents that the initial states are of; None: all."""
    output_final_state: bool

    @property
    def initial_states(self) -> Float[Tensor, "documents n d dv"] | None:
        """The state before each document, zeros where none is given; None where none is at all."""
        if self.initial_state is None:
            return None
        assert self.lengths is not None
        return spread_states(self.initial_state, self.initial_documents, len(self.lengths))

    def checked(self) -> "LightningInputs":
        """Return these inputs with the lengths of all documents.

        Raises:
            ValueError: shapes, dtypes or boundaries contradict each other.
        """
        check_tokens(self.q, self.k, self.v, self.slopes)
        lengths = document_lengths(self.cu_seqlens, self.q.shape[0], self.lengths)
        documents = self.initial_documents
        if documents is not None:
            _check_documents(documents, len(lengths), self.initial_state)
        count = len(lengths) if documents is None else len(documents)
        check_state(self.initial_state, (count, *self.q.shape[1:], self.v.shape[2]))
        return self._replace(lengths=lengths)


def spread_states(
    states: Float[Tensor, "states n d dv"], documents: tuple[int, ...] | None, count: int
) -> Float[Tensor, "documents n d dv"]:
    """Return a state for each of `count` documents: those given, and zeros else. Differentiable."""
    if documents is None:
        return states
    given = dict(zip(documents, states.unbind(), strict=True))
    zeros = states.new_zeros(states.shape[1:])
    # No index tensor: the host would wait for a copy of it to the device.
    return torch.stack([given.get(number, zeros) for number in range(count)])


def _check_documents(documents: tuple[int, ...], count: int, states: Tensor | None) -> None:
    if states is None:
        raise ValueError(f"initial_documents={documents} have no initial_state; give both or none")
    if list(documents) != sorted({*documents} & {*range(count)}):
        raise ValueError(
            f"initial_documents={documents} are not ascending numbers of {count} documents, from "
            "0; give the document of each initial state once"
        )


def check_tokens(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> None:
    """Refuse queries, keys, values and slopes that do not fit each other."""
    shapes = f"q={tuple(q.shape)}, k={tuple(k.shape)}, v={tuple(v.shape)}"
    if q.dim() != 3 or k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(f"{shapes} are not [t, n, d], [t, n, d], [t, n, dv]; see the docstring")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype")
    if slopes.shape != q.shape[1:2]:
        raise ValueError(
            f"slopes={tuple(slopes.shape)} do not match the {q.shape[1]} heads of {shapes}; shard "
            "the slopes of the layer like its heads"
        )
    compute_dtype(q.dtype)


def check_state(state: Tensor | None, shape: tuple[int, ...]) -> None:
    """Refuse a state of another shape."""
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f"state={tuple(state.shape)} is not {shape}; give one state per document")
