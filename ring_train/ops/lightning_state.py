"""The state that lightning attention carries from one run of tokens to the next.

With these two functions a row can be cut anywhere: the state after a run follows from the run alone
and the state before it, and the output of a token is the sum of what its own run and what the state
before the run give it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ring_train.ops.decay import decay_weights


def run_state(
    k: Float[Tensor, "t n d"], v: Float[Tensor, "t n dv"], rates: Float[Tensor, " n"]
) -> Float[Tensor, "n d dv"]:
    """Return the state after a run of tokens that began with none, in the dtype of `k`.

    Args:
        k: keys, fp32 or fp64.
        v: values.
        rates: decay rates > 0, float64.
    """
    age = torch.arange(k.shape[0] - 1, -1, -1, device=k.device)
    weight = decay_weights(rates, age, k.dtype).mT.unsqueeze(2)  # [t, n, 1]
    return torch.einsum("tnd,tne->nde", k * weight, v)


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
