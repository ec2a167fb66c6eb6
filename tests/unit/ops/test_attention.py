"""Softmax attention within documents against the whole masked score matrix."""

import inspect
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ring_train.ops.attention import (
    cached_attention,
    document_attention,
    document_attention_reference,
)

TIGHT_FP64 = 1e-10  # values up to 1e1, sums of up to 1e3 roundings of 1e-16
RELATIVE_FP32 = 5e-6  # of the largest value: about 20 roundings of 6e-8 in a row of sums
ROUNDING_BF16 = 2.0**-6  # the fused kernel rounds the weights too: two roundings of 2^-8 in a sum

HEAD_DIM = 8
LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=6).map(tuple)


def cu_seqlens_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def make_inputs(
    lengths: tuple[int, ...], heads: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    count = {"q": heads[0], "k": heads[1], "v": heads[1]}
    return {
        name: torch.randn(sum(lengths), n, HEAD_DIM, generator=generator).to(dtype)
        for name, n in count.items()
    }


def run(
    attention: Callable[..., Tensor], inputs: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """Return the output and the gradients of a fixed functional of it."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    output = attention(**leaves, **options)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(output, list(leaves.values()), weights.to(output.dtype))
    found = {f"grad of {name}": x for name, x in zip(leaves, grads, strict=True)}
    return {"output": output.detach()} | found


@settings(max_examples=25, deadline=None)
@given(
    lengths=LENGTHS,
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    scale=st.sampled_from([None, 0.7]),
    host_lengths=st.booleans(),
)
def test_attention_equals_reference_in_fp64(
    lengths: tuple[int, ...], heads: tuple[int, int], scale: float | None, host_lengths: bool
) -> None:
    inputs = make_inputs(lengths, heads, torch.float64)
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens_of(lengths), "scale": scale}
    expected = run(document_attention_reference, inputs, **options)
    options["lengths"] = lengths if host_lengths else None
    for name, x in run(document_attention, inputs, **options).items():
        assert x.dtype == torch.float64, name
        assert float((x - expected[name]).abs().max()) <= TIGHT_FP64, name


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, RELATIVE_FP32), (torch.bfloat16, ROUNDING_BF16)]
)
@pytest.mark.parametrize("lengths", [(300,), (20,) * 12, (1, 200, 33)])
def test_lower_precision_is_within_rounding_of_fp64(
    lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    inputs = make_inputs(lengths, (4, 2), dtype)
    cu_seqlens = cu_seqlens_of(lengths)
    exact = {name: x.double() for name, x in inputs.items()}
    expected = run(document_attention_reference, exact, cu_seqlens=cu_seqlens)
    for name, x in run(document_attention, inputs, cu_seqlens=cu_seqlens).items():
        assert x.dtype == dtype, name
        atol = tolerance * float(expected[name].abs().max())
        assert float((x.double() - expected[name]).abs().max()) <= atol, name


@settings(max_examples=15, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 50), min_size=2, max_size=6).map(tuple))
def test_a_document_is_bit_equal_whatever_its_neighbours_hold(
    data: st.DataObject, lengths: tuple[int, ...]
) -> None:
    changed = data.draw(st.integers(0, len(lengths) - 1))
    cu_seqlens = cu_seqlens_of(lengths)
    inside = slice(*cu_seqlens[changed : changed + 2].tolist())
    inputs = make_inputs(lengths, (4, 2), torch.float32)
    others = {name: x.clone() for name, x in inputs.items()}
    for name, x in make_inputs(lengths, (4, 2), torch.float32, seed=2).items():
        others[name][inside] = 1e3 * x[inside]
    found = run(document_attention, inputs, cu_seqlens=cu_seqlens)
    again = run(document_attention, others, cu_seqlens=cu_seqlens)
    kept = torch.ones(sum(lengths), dtype=torch.bool)
    kept[inside] = False
    for name, x in found.items():
        assert torch.equal(x[kept], again[name][kept]), name
    assert not torch.equal(found["output"][~kept], again["output"][~kept])


def test_one_token_documents_return_their_values() -> None:
    inputs = make_inputs((1,) * 5, (4, 2), torch.float64)
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    output = document_attention(q, k, v, cu_seqlens=cu_seqlens_of((1,) * 5))
    assert torch.equal(output, v.repeat_interleave(2, dim=1))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": torch.zeros(5, 3, 8), "v": torch.zeros(5, 3, 8)}, "do not divide query heads"),
        ({"v": torch.zeros(5, 1, 8)}, r"are not \[t, n, d\]"),
        ({"k": torch.zeros(4, 2, 8), "v": torch.zeros(4, 2, 8)}, r"are not \[t, n, d\]"),
        ({"q": torch.zeros(5, 4, 8).double()}, "cast them to one dtype"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "rise strictly"),
        ({"lengths": (3, 2)}, "differ from those"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, Any], match: str) -> None:
    inputs = make_inputs((2, 3), (4, 2), torch.float32)
    options = {"cu_seqlens": torch.tensor([0, 2, 5])}
    with pytest.raises(ValueError, match=match):
        inspect.unwrap(document_attention)(**(inputs | options | change))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, TIGHT_FP64), (torch.bfloat16, ROUNDING_BF16)]
)
def test_a_cached_query_sees_the_keys_of_its_sequence(
    heads: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    """Against the last query of each sequence as a document; what lies behind a length is noise."""
    lengths = (1, 7, 30, 29)
    inputs = make_inputs(lengths, heads, dtype)
    expected = document_attention_reference(**inputs, cu_seqlens=cu_seqlens_of(lengths), scale=0.7)
    last = torch.tensor(lengths).cumsum(0) - 1
    cache = {
        name: torch.full((len(lengths), 33, heads[1], HEAD_DIM), 1e4, dtype=dtype)
        for name in ("k", "v")
    }
    for name, tensor in cache.items():
        for slot, part in enumerate(inputs[name].split(lengths)):
            tensor[slot, : len(part)] = part
    found = cached_attention(
        inputs["q"][last], cache["k"], cache["v"], lengths=torch.tensor(lengths), scale=0.7
    )
    assert found.dtype == dtype
    assert float((found - expected[last]).abs().max()) <= tolerance


def test_cached_heads_that_do_not_fit_are_refused() -> None:
    keys = torch.zeros(2, 5, 3, HEAD_DIM)
    with pytest.raises(ValueError, match="n a multiple of g"):
        cached_attention(torch.zeros(2, 4, HEAD_DIM), keys, keys, lengths=torch.ones(2).long())
