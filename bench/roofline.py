"""Arithmetic of lightning attention: FLOPs, bytes, and what a memory-bound pass can reach.

A unit is one [t, n, d] tensor of the input dtype, with dv = d. Every pass reads and writes each of
its inputs and outputs at least once; that is the ideal. Each 64-token chunk has about 100 FLOPs for
each byte of it in bf16, and a GPU of this age computes 250 to 300 in that time: memory bounds all.
"""

NOMINAL_CHUNK = 64
"""Tokens of the chunk whose FLOPs are counted, whatever chunk a kernel has: rates compare times."""
IDEAL_FORWARD_UNITS = 4
"""q, k, v in; o out."""
IDEAL_BACKWARD_UNITS = 7
"""q, k, v and the gradient of o in; those of q, k, v out."""


def forward_flops(num_tokens: int, head_dim: int, chunk: int = NOMINAL_CHUNK) -> int:
    """Return the FLOPs of one head: 2cd + 4d^2 a token.

    Inside a chunk two causal products (scores, and scores times values), c/2 tokens each on
    average; outside two with a [d, d] state (its update, and what a query reads).
    """
    return num_tokens * (2 * chunk * head_dim + 4 * head_dim**2)


def backward_flops(num_tokens: int, head_dim: int, chunk: int = NOMINAL_CHUNK) -> int:
    """Return the FLOPs of one head: 5cd + 10d^2 a token.

    Inside a chunk five causal products: scores again, their gradient, and one for each of q, k, v;
    outside five with a state: both scans, and one for each of q, k, v.
    """
    return num_tokens * (5 * chunk * head_dim + 10 * head_dim**2)


def ideal_bytes(num_tokens: int, head_dim: int, element_bytes: int, *, backward: bool) -> int:
    """Return the least bytes that the forward pass of one head moves, or both passes."""
    units = IDEAL_FORWARD_UNITS + (IDEAL_BACKWARD_UNITS if backward else 0)
    return units * num_tokens * head_dim * element_bytes


def state_units(head_dim: int, chunk: int, state_bytes: int, element_bytes: int) -> float:
    """Return the units of one state per chunk: [d, d] against the chunk's own [c, d]."""
    return head_dim * state_bytes / (chunk * element_bytes)


def two_pass_units(head_dim: int, chunk: int, state_bytes: int, element_bytes: int) -> list[float]:
    """Return the units that our kernels move, forward and backward.

    Forward: k, v in, states out; q, k, v, states in, o out. Backward: q and the gradient in, states
    out; both kinds of states, q, k, v and the gradient in; three gradients out. What two programs
    of one chunk both read counts once, as the second finds it in the L2 cache.
    """
    state = state_units(head_dim, chunk, state_bytes, element_bytes)
    return [6 + 2 * state, 9 + 3 * state]


def fla_units(head_dim: int) -> list[float]:
    """Return the units that flash-linear-attention moves in bf16, forward and backward.

    Chunks of 64. Forward as ours, with states in bf16. Backward: forward states again and backward
    states, in fp32; one kernel for q and k (q, k, v, gradient, both states in; two out), one for v
    (q, k, gradient, a state in; one out).

    Source: fla-org/flash-linear-attention 0.6.0, `fla/ops/simple_gla/chunk.py`.
    """
    half, full = state_units(head_dim, 64, 2, 2), state_units(head_dim, 64, 4, 2)
    states = 2 * (2 + full)
    return [6 + 2 * half, states + (4 + 2 * full + 2) + (3 + full + 1)]


def reachable_fraction(units: list[float]) -> float:
    """Return the fraction of the byte roofline of both passes that so many units allow."""
    return (IDEAL_FORWARD_UNITS + IDEAL_BACKWARD_UNITS) / sum(units)
