"""The state that lightning attention carries from one run of tokens to the next.

With these two functions a row can be cut anywhere: the state after a run follows from the run alone
and the state before it, and the output of a token is the sum of what its own run and what the state
before the run give it.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ring_train.ops.decay import decay_weights
from ring_train.ops.precision import compute_dtype


def run_state(
    k: Float[Tensor, "t n d"], v: Float[Tensor, "t n dv"], rates: Float[Tensor, " n"]
) -> Float[Tensor, "n d dv"]:
    """Return the state after a run of tokens that began with none, in fp32 (fp64 for fp64 keys).

    Differentiable once, in `k` and `v`, which are all that is kept for it.

    Args:
        k: keys.
        v: values.
        rates: decay rates > 0, float64.
    """
    return _RunState.apply(k, v, rates)


class _RunState(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
        ctx.save_for_backward(k, v, rates)
        keys, values, weight = _weighed(k, v, rates)
        return torch.einsum("tnd,tne->nde", keys * weight, values)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override] -- once_differentiable hides the name of ctx
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        k, v, rates = ctx.saved_tensors
        keys, values, weight = _weighed(k, v, rates)
        grad_k = torch.einsum("tne,nde->tnd", values, grad) * weight
        grad_v = torch.einsum("tnd,nde->tne", keys * weight, grad)
        return grad_k.to(k.dtype), grad_v.to(v.dtype), None


def _weighed(k: Tensor, v: Tensor, rates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values to compute with, and what is left of each at the end [t, n, 1]."""
    dtype = compute_dtype(k.dtype)
    age = torch.arange(k.shape[0] - 1, -1, -1, device=k.device)
    return k.to(dtype), v.to(dtype), decay_weights(rates, age, dtype).mT.unsqueeze(2)


def read_state(
    q: Float[Tensor, "t n d"], state: Float[Tensor, "n d dv"], rates: Float[Tensor, " n"]
) -> Float[Tensor, "t n dv"]:
    """Return what each token of a run reads from the state before the run; `q` carries the scale.

    Args:
        q: queries, fp32 or fp64.
        state: in the dtype of `q`.
        rates: decay rates > 0, float64.
    """
    age = torch.arange(1, q.shape[0] + 1, device=q.device)
    weight = decay_weights(rates, age, q.dtype).mT.unsqueeze(2)  # [t, n, 1]
    return torch.einsum("tnd,nde->tne", q * weight, state)


def transfer_weights(
    rates: Float[Tensor, " n"],
    distances: tuple[tuple[int | None, ...], ...],
    dtype: torch.dtype,
) -> Float[Tensor, "n segments segments"]:
    """Return [head, i, j]: how much of the state of segment i is left where segment j begins.

    Args:
        rates: decay rates > 0, float64.
        distances: tokens between the end of i and the start of j, None where nothing passes.
        dtype: of the result.
    """
    steps = [[-1 if tokens is None else tokens for tokens in row] for row in distances]
    return decay_weights(rates, torch.tensor(steps, device=rates.device), dtype)
