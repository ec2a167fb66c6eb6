"""Choosing the next token: what the model says of it, and the choice itself.

A choice is a function of the logits and one number in [0, 1) per sequence, so a text does not
depend on what else is in the batch.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ring_train.ops.precision import compute_dtype

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def next_token_logprobs(logits: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
    """Return the log-probabilities of the model's own distribution, in fp32 (fp64), nats."""
    return torch.log_softmax(logits.to(compute_dtype(logits.dtype)), dim=-1)


def entropies_of(logprobs: Float[Tensor, "b v"]) -> Float[Tensor, " b"]:
    """Return the entropy of each distribution in nats; outcomes of probability 0 count 0."""
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


def choose_tokens(
    logprobs: Float[Tensor, "b v"],
    uniforms: Float[Tensor, " b"],
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> Int[Tensor, " b"]:
    """Return one token per sequence; of equally likely ones the smaller id comes first.

    The distribution is sharpened by the temperature, cut to the `top_k` likeliest tokens, then to
    the fewest likeliest whose probabilities (of what is left) reach `top_p`; at least one remains.
    A token is one of the v whatever the logits are, NaN included.

    Args:
        logprobs: log-probabilities, or logits.
        uniforms: fp64 numbers in [0, 1): where the choice lies in the cumulative distribution.
        temperature: finite; 0 for the likeliest token.
        top_k: at least 1; None for no cut.
        top_p: above 0, at most 1, which is no cut.
    """
    if temperature == 0:
        return logprobs.argmax(-1)
    # Beyond these bounds nothing changes but that a float (or its inverse) overflows.
    smallest = torch.finfo(logprobs.dtype).tiny
    temperature = min(max(temperature, smallest), 1 / smallest)
    distances = logprobs - logprobs.amax(-1, keepdim=True)
    probabilities = torch.softmax(distances / temperature, dim=-1)
    if top_p == 1 and (top_k is None or top_k >= logprobs.shape[1]):
        return _inverse_distribution(probabilities.cumsum(-1, dtype=torch.float64), uniforms)
    sorted_probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    cumulative = sorted_probabilities[:, :top_k].cumsum(-1, dtype=torch.float64)
    before = cumulative - sorted_probabilities[:, :top_k]
    kept = (before < top_p * cumulative[:, -1:]).sum(-1, keepdim=True).clamp(min=1)
    places = torch.arange(cumulative.shape[1], device=cumulative.device)
    total = cumulative.gather(-1, kept - 1)
    cumulative = torch.where(places < kept, cumulative, total)
    return order.gather(-1, _inverse_distribution(cumulative, uniforms)[:, None]).squeeze(-1)


def _inverse_distribution(
    cumulative: Float[Tensor, "b m"], uniforms: Float[Tensor, " b"]
) -> Int[Tensor, " b"]:
    """Return the first outcome whose cumulative weight exceeds uniform times the total."""
    total = cumulative[:, -1:].contiguous()
    wanted = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, 0 * total))
    outcomes = torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)
    return outcomes.clamp(max=cumulative.shape[1] - 1)


def position_uniforms(
    seed: int,
    prompts: Int[np.ndarray, " n"],
    samples: Int[np.ndarray, " n"],
    positions: Int[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """Return a fp64 number in [0, 1) for each sequence, a pure function of the four arguments.

    Args:
        seed: of the whole run; its lower 64 bits count.
        prompts: index of the prompt.
        samples: number of the sample of this prompt, below 2 ** 32.
        positions: number of the token in the answer, below 2 ** 32.
    """
    wide = prompts.astype(np.uint64)
    counters = [positions.astype(np.uint64), samples.astype(np.uint64), wide & _LOW, wide >> _HALF]
    seed %= 1 << 64
    words = philox_4x32(counters, (seed & 0xFFFFFFFF, seed >> 32))
    return ((words[0] >> np.uint64(5)) * 67108864.0 + (words[1] >> np.uint64(6))) / 2.0**53


def philox_4x32(counters: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Return four arrays of 32-bit words (as uint64), scrambled from four counters and a key.

    Source: J. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011: Philox4x32-10.
    """
    a, b, c, d = counters
    for number in range(_ROUNDS):
        keys = [
            np.uint64((k + number * s) & 0xFFFFFFFF) for k, s in zip(key, _KEY_STEPS, strict=True)
        ]
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            (second >> _HALF) ^ b ^ keys[0],
            second & _LOW,
            (first >> _HALF) ^ d ^ keys[1],
            first & _LOW,
        )
    return [a, b, c, d]
