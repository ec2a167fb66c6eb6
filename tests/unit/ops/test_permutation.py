"""Permutation: torch against a loop over tokens, Triton's kernels, interpreted, against torch."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ring_train.ops.permutation import (
    Permutation,
    make_permutation,
    permute_tokens,
    permute_weights,
    unpermute_tokens,
)

ROUNDING_FP32 = 1e-6
"""Relative to 1: at most 8 numbers of about that size are added, each sum rounded to 6e-8."""


def make_map(tokens: int, experts: int, topk: int, seed: int = 0, fewer: bool = False) -> Tensor:
    """Return a routing map; expert 1 is nobody's, and with `fewer` some tokens have less."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator)
    scores[:, 1] = -1.0
    chosen = torch.zeros(tokens, experts, dtype=torch.bool)
    chosen.scatter_(1, scores.topk(topk).indices, True)
    if fewer:
        chosen &= torch.rand(tokens, experts, generator=generator) < 0.7
    return chosen


def rows_by_loop(routing_map: Tensor) -> list[tuple[int, int]]:
    """Return (token, expert) of each row."""
    tokens, experts = routing_map.shape
    return [(t, e) for e in range(experts) for t in range(tokens) if routing_map[t, e]]


@given(
    tokens=st.integers(0, 9),
    experts=st.integers(2, 7),
    topk=st.integers(1, 7),
    seed=st.integers(0, 9),
    fewer=st.booleans(),
)
def test_every_chosen_expert_has_one_row_in_order(
    tokens: int, experts: int, topk: int, seed: int, fewer: bool
) -> None:
    topk = min(topk, experts)
    routing_map = make_map(tokens, experts, topk, seed, fewer)
    permutation = make_permutation(routing_map, topk)
    expected = rows_by_loop(routing_map)
    filled = permutation.slot[: len(expected)]
    assert (permutation.slot[len(expected) :] == -1).all()
    assert permutation.slot.shape == (tokens * topk,)
    found = [(s // topk, int(permutation.experts[s // topk, s % topk])) for s in filled.tolist()]
    assert found == expected
    assert permutation.counts.tolist() == routing_map.sum(0).tolist()
    back = [(permutation.rows.flatten()[s]) for s in filled.tolist()]
    assert back == list(range(len(expected)))
    assert int((permutation.rows >= 0).sum()) == len(expected)


def run(permutation: Permutation, leaves: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
    """Return rows, their weights, sums over rows, and all gradients of a fixed functional."""
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    rows = permute_tokens(leaves["x"], permutation, backend=backend)
    weights = permute_weights(leaves["weights"], permutation)
    tokens = unpermute_tokens(leaves["y"], permutation, backend=backend)
    scale = torch.linspace(-1, 1, rows.numel(), dtype=rows.dtype).view_as(rows)
    loss = (rows * weights[:, None].to(rows.dtype) * scale).sum() + tokens.square().sum()
    loss.backward()
    found: dict[str, Any] = {f"grad {name}": x.grad for name, x in leaves.items()}
    return found | {"rows": rows, "row weights": weights, "tokens": tokens}


def make_leaves(permutation: Permutation, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens, experts = permutation.rows.shape[0], permutation.counts.shape[0]
    shapes = {
        "x": (tokens, width),
        "weights": (tokens, experts),
        "y": (permutation.slot.shape[0], width),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("fewer", [False, True])
def test_tokens_go_to_the_rows_of_their_experts_and_back(fewer: bool) -> None:
    routing_map = make_map(11, 6, 3, fewer=fewer)
    permutation = make_permutation(routing_map, 3)
    leaves = make_leaves(permutation, 5, torch.float64)
    expected = rows_by_loop(routing_map)
    found = run(permutation, leaves, "torch")
    x = leaves["x"].clone().requires_grad_()
    weights = leaves["weights"].clone().requires_grad_()
    y = leaves["y"].clone().requires_grad_()
    rows = x.new_zeros(33, 5)
    row_weights = x.new_zeros(33)
    tokens = x.new_zeros(11, 5)
    for row, (t, e) in enumerate(expected):
        rows = rows.index_put((torch.tensor(row),), x[t])
        row_weights = row_weights.index_put((torch.tensor(row),), weights[t, e])
        tokens = tokens.index_put((torch.tensor(t),), y[row], accumulate=True)
    scale = torch.linspace(-1, 1, rows.numel(), dtype=rows.dtype).view_as(rows)
    ((rows * row_weights[:, None] * scale).sum() + tokens.square().sum()).backward()
    by_loop = {"rows": rows, "row weights": row_weights, "tokens": tokens}
    by_loop |= {"grad x": x.grad, "grad weights": weights.grad, "grad y": y.grad}
    for name, value in by_loop.items():
        torch.testing.assert_close(found[name], value, rtol=1e-14, atol=1e-14, msg=name)


@pytest.mark.parametrize("width", [8, 37, 2500])
@pytest.mark.parametrize(("topk", "fewer"), [(1, False), (3, True), (8, False)])
def test_triton_permutes_like_torch(width: int, topk: int, fewer: bool) -> None:
    permutation = make_permutation(make_map(5, 9, topk, fewer=fewer), topk)
    leaves = make_leaves(permutation, width, torch.float32)
    expected = run(permutation, leaves, "torch")
    found = run(permutation, leaves, "triton")
    for name in ("rows", "row weights"):
        assert found[name].equal(expected[name]), name
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=ROUNDING_FP32, atol=ROUNDING_FP32, msg=name
        )


def test_sums_are_rounded_once() -> None:
    permutation = make_permutation(torch.ones(1, 4, dtype=torch.bool), 4)
    y = torch.tensor([[1.0], [2**-12], [2**-12], [2**-12]], dtype=torch.float16)
    assert float(unpermute_tokens(y, permutation, backend="torch")) == 1.0 + 2**-10
    assert float(unpermute_tokens(y, permutation, backend="triton")) == 1.0 + 2**-10


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_without_a_token_are_not_read(backend: str) -> None:
    permutation = make_permutation(torch.tensor([[True, False], [True, False]]), 2)
    y = torch.tensor([[1.0], [2.0], [torch.nan], [torch.nan]], requires_grad=True)
    tokens = unpermute_tokens(y, permutation, backend=backend)
    assert tokens.flatten().tolist() == [1.0, 2.0]
    tokens.sum().backward()
    assert y.grad is not None
    assert y.grad.flatten().tolist() == [1.0, 1.0, 0.0, 0.0]


def test_a_token_with_too_many_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="more than topk=1 experts; give the topk"):
        make_permutation(torch.ones(2, 3, dtype=torch.bool), 1)


def test_what_does_not_fit_is_refused() -> None:
    permutation = make_permutation(make_map(4, 5, 2), 2)
    with pytest.raises(ValueError, match="topk=9, routing_map"):
        make_permutation(make_map(4, 5, 2), 9)
    with pytest.raises(ValueError, match="x has 3 rows, but the permutation is of 4"):
        permute_tokens(torch.zeros(3, 2), permutation)
    with pytest.raises(ValueError, match="y has 4 rows, but the permutation is of 8"):
        unpermute_tokens(torch.zeros(4, 2), permutation)
    with pytest.raises(ValueError, match="weights has 8 rows"):
        permute_weights(torch.zeros(8, 5), permutation)
