"""The choice of the next token: exact inverse distribution, cuts, and its random numbers."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ring_train.ops.sampling import (
    choose_tokens,
    entropies_of,
    next_token_logprobs,
    philox_4x32,
    position_uniforms,
)

ROUNDING = 1e-6
"""Probabilities in fp32."""
CHI_SQUARE_LIMIT = 40.0
"""Of 15 degrees of freedom: exceeded once in 2000 seeds; the seed is fixed."""
FLOAT64_ROUNDING = 1e-12


def logits_of(probabilities: list[float]) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def choices(
    probabilities: list[float], uniforms: list[float], temperature: float = 1.0, **cuts: Any
) -> list[int]:
    logits = logits_of(probabilities).expand(len(uniforms), -1)
    numbers = torch.tensor(uniforms, dtype=torch.float64)
    return choose_tokens(logits, numbers, temperature=temperature, **cuts).tolist()


@given(
    weights=st.lists(st.integers(0, 50), min_size=2, max_size=9).filter(any),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_the_choice_is_the_inverse_of_the_cumulative_distribution(
    weights: list[int], uniform: float
) -> None:
    ends = np.cumsum(weights) / sum(weights)
    (token,) = choices([float(w) for w in weights], [uniform])
    assert weights[token] > 0
    before = ends[token - 1] if token else 0.0
    assert before - FLOAT64_ROUNDING <= uniform <= ends[token] + FLOAT64_ROUNDING


EDGES = [0.0, 0.25, 0.49, 0.51, 0.65, 0.8, 1 - 2**-53]


def test_a_cut_keeps_the_likeliest_in_the_order_of_their_probabilities() -> None:
    probabilities = [0.1, 0.5, 0.1, 0.3]
    assert choices(probabilities, EDGES, top_k=1) == [1] * 7
    assert choices(probabilities, EDGES, top_k=2) == [1, 1, 1, 1, 3, 3, 3]
    # Of equally likely tokens the smaller id is kept.
    assert set(choices(probabilities, EDGES, top_k=3)) == {1, 3, 0}
    assert set(choices(probabilities, EDGES, top_k=9)) == {0, 1, 2, 3}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    probabilities = [0.125, 0.5, 0.125, 0.25]
    assert set(choices(probabilities, EDGES, top_p=1e-9)) == {1}
    assert set(choices(probabilities, EDGES, top_p=0.5)) == {1}
    assert set(choices(probabilities, EDGES, top_p=0.51)) == {1, 3}
    assert set(choices(probabilities, EDGES, top_p=0.76)) == {1, 3, 0}
    assert set(choices(probabilities, EDGES, top_p=1.0)) == {0, 1, 2, 3}


def test_top_p_counts_what_top_k_has_left() -> None:
    probabilities = [0.1, 0.4, 0.2, 0.3]
    # 0.4 of the 0.7 that two tokens have is more than a half.
    assert set(choices(probabilities, EDGES, top_k=2, top_p=0.55)) == {1}
    assert set(choices(probabilities, EDGES, top_k=2, top_p=0.6)) == {1, 3}


def test_temperature_sharpens_and_zero_takes_the_likeliest() -> None:
    assert choices([0.3, 0.4, 0.3], [0.0, 0.999], temperature=0.0) == [1, 1]
    assert choices([0.4, 0.4, 0.2], [0.999], temperature=0.0) == [0]
    # 0.75 : 0.25 becomes 9 : 1 at temperature 1/2, and 1 : 1 at a very high one.
    assert choices([0.75, 0.25], [0.89, 0.91], temperature=0.5) == [0, 1]
    assert choices([0.75, 0.25], [0.49, 0.51], temperature=1e6) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.99}])
def test_temperatures_may_be_of_any_size(cut: dict[str, Any], dtype: torch.dtype) -> None:
    logits = torch.tensor([[-torch.inf, -90.0, -90.0 + 1e-5, -100.0]], dtype=dtype).expand(3, -1)
    numbers = torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64)
    for temperature in (5e-324, 1e-310, 1e-40, 1e-30):
        assert choose_tokens(logits, numbers, temperature=temperature, **cut).tolist() == [2] * 3
    for temperature in (1e30, 1e40, 1.7e308):
        tokens = choose_tokens(logits, numbers, temperature=temperature, **cut).tolist()
        assert sorted(tokens) == [1, 2, 3]


@pytest.mark.parametrize("cut", [{}, {"top_k": 2}, {"top_p": 0.9}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_choose_a_token_of_the_vocabulary(
    wrong: float, temperature: float, cut: dict[str, Any]
) -> None:
    numbers = torch.tensor([0.0, 0.999], dtype=torch.float64)
    for logits in (torch.tensor([[0.0, wrong, 1.0]] * 2), torch.full((2, 3), wrong)):
        logprobs = next_token_logprobs(logits)
        tokens = choose_tokens(logprobs, numbers, temperature=temperature, **cut)
        assert ((tokens >= 0) & (tokens < 3)).all()


@pytest.mark.parametrize("cut", [{}, {"top_k": 16}, {"top_p": 0.9999}])
def test_frequencies_are_those_of_the_distribution(cut: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, 16, generator=generator)
    count = 20_000
    order = np.arange(count)
    uniforms = torch.from_numpy(position_uniforms(7, order // 50, order % 5, order % 50 // 5))
    tokens = choose_tokens(logits.expand(count, -1), uniforms, temperature=1.0, **cut)
    found = torch.bincount(tokens, minlength=16).double()
    expected = count * torch.softmax(logits[0].double(), -1)
    assert float(((found - expected) ** 2 / expected).sum()) < CHI_SQUARE_LIMIT


def test_the_largest_number_chooses_a_token_that_can_be() -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, :7] = 0.1
    last = torch.tensor([1 - 2**-53], dtype=torch.float64)
    cuts: list[dict[str, Any]] = [{}, {"top_p": 0.99}, {"top_k": 40}]
    for cut in cuts:
        assert int(choose_tokens(logits, last, temperature=1.0, **cut)) == 6


def test_logprobs_and_entropies_are_of_the_distribution_itself() -> None:
    logprobs = next_token_logprobs(torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 100.0, 0.0]]))
    assert logprobs[0, :2].exp().tolist() == pytest.approx([0.5, 0.5], abs=ROUNDING)
    assert entropies_of(logprobs).tolist() == pytest.approx([np.log(2), 0.0], abs=ROUNDING)
    assert next_token_logprobs(torch.zeros(1, 2, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(
    ("counters", "key", "words"),
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_random_words_are_the_published_ones(
    counters: list[int], key: tuple[int, int], words: list[int]
) -> None:
    """The known answers of the Random123 library."""
    found = philox_4x32([np.array([word], dtype=np.uint64) for word in counters], key)
    assert [int(word[0]) for word in found] == words


def test_a_number_depends_on_seed_prompt_sample_and_position_alone() -> None:
    count = 300
    generator = np.random.default_rng(0)
    places = [generator.integers(0, 9, count) for _ in range(3)]
    together = position_uniforms(11, *places)
    for i in range(0, count, 37):
        alone = position_uniforms(11, *(place[i : i + 1] for place in places))
        assert alone[0] == together[i]
    keys = set(zip(*(place.tolist() for place in places), strict=True))
    assert len(set(together.tolist())) == len(keys)
    assert not set(together.tolist()) & set(position_uniforms(12, *places).tolist())
    assert 0 <= together.min() < 0.05
    assert 0.95 < together.max() < 1
    assert position_uniforms(-1, *places)[0] == position_uniforms(2**64 - 1, *places)[0]
