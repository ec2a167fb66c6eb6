"""From the fused projection to query, key and value: split, QK-norm and partial RoPE."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ring_train.ops.backends import resolve_backend
from ring_train.ops.norm import rms_norm
from ring_train.ops.precision import compute_dtype
from ring_train.ops.rope import apply_partial_rope

MAX_HEAD_DIM = 256
"""Of the Triton kernels, which hold whole heads in registers."""

Heads = tuple[Float[Tensor, "t n d"], Float[Tensor, "t g d"], Float[Tensor, "t g d"]]


def split_qk_norm_rope(
    qkv: Float[Tensor, "t g slots d"],
    weights: tuple[Float[Tensor, " d"], Float[Tensor, " d"]] | None,
    cos: Float[Tensor, "t r"],
    sin: Float[Tensor, "t r"],
    *,
    eps: float,
    silu: bool = False,
    backend: str = "auto",
) -> Heads:
    """Return query and key, normalised and rotated, and value: rope(rms_norm(q)) and so on.

    "triton" reads and writes every element once: 2 (n + 2 g) d elements and 2 r cosines and sines
    (fp32) for a token. Backward, 3 (n + 2 g) d elements (g d fewer without `silu`, g d of which are
    values that are then not read), and only `qkv` is kept. "torch" keeps what autograd does.

    Args:
        qkv: heads of each query group side by side, n/g queries, a key and a value, as megatron's
            `linear_qkv` gives them; n/g = slots - 2.
        weights: of the norms of query and key, as in `rms_norm`; None: there are none.
        cos: of `rotary_angles`; as in `apply_partial_rope`, r <= d.
        sin: see cos.
        eps: added to mean squares.
        silu: whether queries, keys and values pass SiLU first.
        backend: "torch", "triton" or "auto"; both round where `rms_norm` and `apply_partial_rope`
            round. Triton takes d up to 256.

    Raises:
        ValueError: shapes that do not match, or what a backend cannot compute.
    """
    _check(qkv, weights, cos, sin)
    if resolve_backend(backend, qkv) == "triton":
        if qkv.shape[3] > MAX_HEAD_DIM:
            raise ValueError(
                f"qkv={tuple(qkv.shape)}: backend='triton' takes heads of up to {MAX_HEAD_DIM} "
                "channels; choose backend='torch'"
            )
        pair = tuple(weight.contiguous() for weight in weights or ()) or (None, None)
        return _SplitQKNormRope.apply(
            qkv.contiguous(),
            *pair,
            cos.float().contiguous(),
            sin.float().contiguous(),
            {"eps": eps, "silu": silu},
        )
    if silu:
        qkv = torch.nn.functional.silu(qkv)
    t, g, slots, d = qkv.shape
    q, k, v = qkv.flatten(2).split([(slots - 2) * d, d, d], dim=2)
    q = q.reshape(t, g * (slots - 2), d)  # [t, n, d]
    if weights is not None:
        q = rms_norm(q, weights[0], eps, backend="torch")
        k = rms_norm(k, weights[1], eps, backend="torch")
    return apply_partial_rope(q, cos, sin), apply_partial_rope(k, cos, sin), v


class _SplitQKNormRope(torch.autograd.Function):
    """The Triton kernels; statistics are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        from ring_train.ops.kernels.qk_norm_rope import split_heads

        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.options = options
        return split_heads(qkv, _pair(q_weight, k_weight), cos, sin, **options)

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override] -- once_differentiable hides the name of ctx
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from ring_train.ops.kernels.qk_norm_rope import join_gradients

        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        q_grad, k_grad, v_grad = (grad.contiguous() for grad in grads)
        weights = _pair(q_weight, k_weight)
        grad, found = join_gradients(
            qkv, weights, cos, sin, (q_grad, k_grad, v_grad), **ctx.options
        )
        if weights is None or found is None:
            return grad, None, None, None, None, None
        of_weights = (x.to(weight.dtype) for x, weight in zip(found, weights, strict=True))
        return grad, *of_weights, None, None, None


def _pair(q_weight: Tensor | None, k_weight: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if q_weight is None or k_weight is None else (q_weight, k_weight)


def _check(qkv: Tensor, weights: tuple[Tensor, Tensor] | None, cos: Tensor, sin: Tensor) -> None:
    compute_dtype(qkv.dtype)
    if qkv.dim() != 4 or qkv.shape[2] < 3:
        raise ValueError(
            f"qkv={tuple(qkv.shape)} is not [t, g, n/g + 2, d]; view the fused projection so, with "
            "at least one query, a key and a value in each group"
        )
    t, _, _, d = qkv.shape
    for weight in weights or ():
        if weight.shape != (d,):
            raise ValueError(
                f"weights={[tuple(weight.shape) for weight in weights or ()]} do not match heads "
                f"of {d} channels; give one weight per channel for query and for key"
            )
    r = cos.shape[-1]
    if cos.shape != (t, r) or sin.shape != (t, r) or r < 2 or r % 2 or r > d:
        raise ValueError(
            f"cos={tuple(cos.shape)}, sin={tuple(sin.shape)} do not fit {t} tokens and heads of "
            f"{d} channels; take them from rotary_angles of the same tokens, with an even "
            "rotary_dim <= d"
        )
    devices = {x.device for x in (qkv, cos, sin, *(weights or ()))}
    if len(devices) > 1:
        raise ValueError(
            f"qkv, weights, cos and sin are on {sorted(map(str, devices))}; move them to one device"
        )
