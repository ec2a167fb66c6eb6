"""Lightning attention (linear attention, one constant decay per head) over packed documents.

    S_t = exp(-slope) * S_{t-1} + k_t^T v_t        S = 0 before the first token of each document
    o_t = scale * q_t S_t

Unusual here:
- A row is cut into chunks at fixed positions, regardless of documents; masks keep documents apart.
  The cost depends on the tokens of the row alone, not on how they are packed (torch and Triton).
- Sums and states are fp32 for inputs below it. Slopes have no gradient.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ring_train.ops.backends import resolve_backend
from ring_train.ops.documents import document_lengths
from ring_train.ops.lightning_chunked import chunked_attention
from ring_train.ops.lightning_inputs import LightningInputs, check_state, check_tokens
from ring_train.ops.precision import compute_dtype

BACKENDS = ("torch", "triton", "fla")


def lightning_attention(  # noqa: PLR0913 -- the customary arguments of such a kernel
    q: Float[Tensor, "t n d"],
    k: Float[Tensor, "t n d"],
    v: Float[Tensor, "t n dv"],
    slopes: Float[Tensor, " n"],
    *,
    cu_seqlens: Int[Tensor, " boundaries"],
    lengths: tuple[int, ...] | None = None,
    scale: float | None = None,
    initial_state: Float[Tensor, "states n d dv"] | None = None,
    initial_documents: tuple[int, ...] | None = None,
    output_final_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "t n dv"], Float[Tensor, "documents n d dv"] | None]:
    """Return the output in the dtype of `q`, and the fp32 (fp64) state after each document or None.

    No finite value of one document reaches another one, in the output or in a gradient: what a
    document gets is bit-equal whatever its neighbours hold. Differentiable once, in q, k, v and
    `initial_state`.

    Args:
        q: queries of one packed row.
        k: keys.
        v: values, whose head dim may differ.
        slopes: decay rates > 0 of these heads, see `decay_slopes`.
        cu_seqlens: [documents + 1], from 0 to t, strictly increasing.
        lengths: host copy of the lengths; spares a sync if cu_seqlens is not on the CPU.
        scale: of the queries, default d ** -0.5.
        initial_state: state before each document, or before those that `initial_documents` names.
        initial_documents: numbers of documents, ascending; the others begin with zeros.
        output_final_state: whether to compute the final states.
        chunk_size: tokens per chunk of torch and Triton, which then choose; changes rounding and
            speed only.
        backend: `torch`, `triton`, `fla`, or `auto`: Triton for bf16 and fp16 on a GPU, else
            torch.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is not positive; use 64 or 128")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = LightningInputs(
        *(q, k, v, slopes, cu_seqlens, lengths, scale),
        *(initial_state, initial_documents, output_final_state),
    ).checked()
    name = lightning_backend(backend, q)
    if name == "torch":
        return chunked_attention(inputs, chunk_size)
    if name == "triton":
        # Triton is imported where it runs only.
        from ring_train.ops.lightning_triton import triton_attention

        return triton_attention(inputs, chunk_size)
    from ring_train.ops.lightning_fla import fla_attention

    return fla_attention(inputs)


def lightning_backend(backend: str, q: Tensor) -> str:
    """Return the backend that `lightning_attention` computes `q` with; see there."""
    if backend == "auto" and q.dtype == torch.float32:
        return "torch"  # the Triton kernels spill registers in fp32
    return resolve_backend(backend, q, BACKENDS)


def lightning_attention_step(
    q: Float[Tensor, "b n d"],
    k: Float[Tensor, "b n d"],
    v: Float[Tensor, "b n dv"],
    slopes: Float[Tensor, " n"],
    state: Float[Tensor, "b n d dv"],
    *,
    scale: float | None = None,
) -> Float[Tensor, "b n dv"]:
    """Return the output of one token per sequence in the dtype of `q`; move `state` on in place.

    The state is contiguous and in fp32, or in fp64 for fp64 inputs.
    """
    check_tokens(q, k, v, slopes)
    check_state(state, (*q.shape, v.shape[2]))
    dtype = compute_dtype(q.dtype)
    if state.dtype != dtype:
        raise ValueError(f"state is {state.dtype} for {q.dtype} inputs; keep it in {dtype}")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    state.mul_(torch.exp(-slopes.detach().double()).to(dtype)[:, None, None])
    flat = state.view(-1, *state.shape[2:])  # [b*n, d, dv]
    query, key, value = (x.to(dtype).flatten(0, 1) for x in (q, k, v))
    flat.baddbmm_(key.unsqueeze(2), value.unsqueeze(1))
    output = (scale * query).unsqueeze(1) @ flat  # [b*n, 1, dv]
    return output.view(v.shape).to(q.dtype)


def lightning_attention_recurrent_reference(
    q: Float[Tensor, "t n d"],
    k: Float[Tensor, "t n d"],
    v: Float[Tensor, "t n dv"],
    slopes: Float[Tensor, " n"],
    *,
    cu_seqlens: Int[Tensor, " boundaries"],
    scale: float | None = None,
    initial_state: Float[Tensor, "documents n d dv"] | None = None,
) -> tuple[Float[Tensor, "t n dv"], Float[Tensor, "documents n d dv"]]:
    """Return what `lightning_attention` returns, token by token: the oracle."""
    lengths = document_lengths(cu_seqlens, q.shape[0], None)
    dtype = compute_dtype(q.dtype)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    decay = torch.exp(-slopes.to(dtype))[:, None, None]
    outputs, states, token = [], [], 0
    for document, length in enumerate(lengths):
        state = torch.zeros(*q.shape[1:], v.shape[2], dtype=dtype, device=q.device)
        if initial_state is not None:
            state = initial_state[document].to(dtype)
        for _ in range(length):
            state = decay * state + k[token].to(dtype)[..., None] * v[token].to(dtype)[:, None, :]
            outputs.append(scale * torch.einsum("nd,nde->ne", q[token].to(dtype), state))
            token += 1
        states.append(state)
    return torch.stack(outputs).to(q.dtype), torch.stack(states)
