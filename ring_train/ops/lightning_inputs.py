"""What every backend of lightning attention gets, checked."""

from typing import NamedTuple

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
    initial_state: Float[Tensor, "documents n d dv"] | None
    output_final_state: bool

    def checked(self) -> "LightningInputs":
        """Return these inputs with the lengths of all documents.

        Raises:
            ValueError: shapes, dtypes or boundaries contradict each other.
        """
        check_tokens(self.q, self.k, self.v, self.slopes)
        lengths = document_lengths(self.cu_seqlens, self.q.shape[0], self.lengths)
        check_state(self.initial_state, (len(lengths), *self.q.shape[1:], self.v.shape[2]))
        return self._replace(lengths=lengths)


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
