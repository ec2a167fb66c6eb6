"""Lightning attention by the Triton kernels of this project."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ring_train.ops.documents import document_indices
from ring_train.ops.kernels.lightning import make_output
from ring_train.ops.kernels.lightning_gradient import make_gradients
from ring_train.ops.kernels.lightning_states import (
    MAX_HEAD_DIM,
    Row,
    States,
    chunk_size_for,
    make_states,
)
from ring_train.ops.lightning_inputs import LightningInputs, spread_states


def triton_attention(
    inputs: LightningInputs, chunk_size: int | None
) -> tuple[Float[Tensor, "t n dv"], Float[Tensor, "documents n d dv"] | None]:
    """Return what `lightning_attention` does.

    Raises:
        ValueError: a head dim above 128, or a chunk size that no block has.
    """
    q, k, v, slopes, cu_seqlens, lengths, scale, initial_state, with_state, with_final = inputs
    assert lengths is not None
    if max(q.shape[2], v.shape[2]) > MAX_HEAD_DIM:
        raise ValueError(
            f"q={tuple(q.shape)}, v={tuple(v.shape)}: backend='triton' has head dims up to "
            f"{MAX_HEAD_DIM}; choose backend='torch' or 'fla'"
        )
    size = chunk_size or chunk_size_for(q)
    if size < 16 or size & (size - 1):
        raise ValueError(
            f"chunk_size={size} is no block of backend='triton'; choose a power of two from 16"
        )
    boundaries = cu_seqlens.to(q.device, torch.int32)
    documents = None
    if len(lengths) > 1:
        documents = document_indices(boundaries, q.shape[0]).to(torch.int32)
    row = Row(slopes.detach().float(), documents, boundaries, scale, size)
    initial = None if initial_state is None else initial_state.float().contiguous()
    q, k, v = _dense(q), _dense(k), _dense(v)
    if initial is None and not with_final:
        return _Attention.apply(q, k, v, row), None
    options = _Options(row, with_final, with_state, len(lengths))
    return _AttentionWithStates.apply(q, k, v, initial, options)


def _dense(x: Tensor) -> Tensor:
    """Return `x` with neighbouring channels of a head side by side; its rows may have gaps."""
    return x if x.stride(2) == 1 else x.contiguous()


class _Options(NamedTuple):
    row: Row
    output_final_state: bool
    initial_documents: tuple[int, ...] | None
    num_documents: int

    def spread(self, initial: Tensor | None) -> Tensor | None:
        """Return a state for each document."""
        if initial is None:
            return None
        return spread_states(initial, self.initial_documents, self.num_documents)

    def gather(self, grad: Tensor | None) -> Tensor | None:
        """Return the rows of [documents, n, d, dv] of those documents that were given a state."""
        if grad is None or self.initial_documents is None:
            return grad
        chosen = [grad[number] for number in self.initial_documents]
        return torch.stack(chosen) if chosen else grad[:0]


class _Attention(torch.autograd.Function):
    """Output without states of documents."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: Row) -> Tensor:
        states, _ = make_states(k, v, row, initial=None, with_final=False, reverse=False)
        _save(ctx, (q, k, v, None), states, row)
        return make_output(q, k, v, row, states, initial=None)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override] -- once_differentiable hides the name of ctx
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad, None)[:3], None


class _AttentionWithStates(torch.autograd.Function):
    """Output and the final states, from initial states; either may be absent.

    What is kept of initial states are those given, without the zeros of other documents.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, initial: Tensor | None, options: _Options
    ) -> tuple[Tensor, Tensor | None]:
        row, before = options.row, options.spread(initial)
        states, final = make_states(
            k, v, row, initial=before, with_final=options.output_final_state, reverse=False
        )
        _save(ctx, (q, k, v, initial), states, row)
        ctx.options = options
        return make_output(q, k, v, row, states, initial=before), final

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override] -- once_differentiable hides the name of ctx
    def backward(ctx: Any, grad: Tensor, final_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        *grads, initial_grad = _gradients(ctx, grad, final_grad)
        return *grads, ctx.options.gather(initial_grad), None


def _save(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], states: States, row: Row
) -> None:
    ctx.save_for_backward(*inputs, states.local, states.carried)
    ctx.row, ctx.chunks_per_segment = row, states.chunks_per_segment


def _gradients(
    ctx: Any, grad: Tensor, final_grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    q, k, v, initial, local, carried = ctx.saved_tensors
    before = None if initial is None else ctx.options.spread(initial)
    return make_gradients(
        (q, k, v, before),
        grad.contiguous(),
        ctx.row,
        States(local, carried, ctx.chunks_per_segment),
        final_grad=None if final_grad is None else final_grad.float().contiguous(),
        with_initial_grad=initial is not None and ctx.needs_input_grad[3],
    )
