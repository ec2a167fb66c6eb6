"""Chunked lightning attention against the token recurrence, forward and every gradient."""

import inspect
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ring_train.ops import lightning_chunked
from ring_train.ops.decay import decay_slopes
from ring_train.ops.lightning import (
    lightning_attention,
    lightning_attention_recurrent_reference,
    lightning_attention_step,
)

TIGHT_FP64 = 1e-10  # values up to 1e2, sums of up to 1e3 roundings of 1e-16
RELATIVE_FP32 = 5e-6  # of the largest value: about 20 roundings of 6e-8 in a row of sums
ROUNDING_BF16 = 2.0**-8  # one rounding to 8 significant bits, relative

NAMES = ("q", "k", "v", "initial_state")
HEADS, KEY_DIM, VALUE_DIM = 3, 4, 5
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(tuple)


def cu_seqlens_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def make_inputs(
    lengths: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    shapes = {
        "q": (num_tokens, HEADS, KEY_DIM),
        "k": (num_tokens, HEADS, KEY_DIM),
        "v": (num_tokens, HEADS, VALUE_DIM),
        "initial_state": (len(lengths), HEADS, KEY_DIM, VALUE_DIM),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def run(
    attention: Callable[..., Any], inputs: dict[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    """Return output, final state, and the gradients of a fixed functional exact in bf16."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    slopes = decay_slopes(HEADS, 1, 4, "zero_based", dtype=torch.float64)
    output, state = attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        slopes,
        initial_state=leaves.get("initial_state"),
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for x in (output, state):
        weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        loss = loss + (x * weights.bfloat16().double()).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {"output": output.detach(), "final_state": state.detach()}
    return found | {f"grad of {name}": x for name, x in zip(leaves, grads, strict=True)}


def chunked(
    inputs: dict[str, Tensor], lengths: tuple[int, ...], chunk_size: int = 64
) -> dict[str, Tensor]:
    return run(
        lightning_attention,
        inputs,
        cu_seqlens=cu_seqlens_of(lengths),
        lengths=lengths,
        output_final_state=True,
        chunk_size=chunk_size,
    )


def recurrent(inputs: dict[str, Tensor], lengths: tuple[int, ...]) -> dict[str, Tensor]:
    return run(lightning_attention_recurrent_reference, inputs, cu_seqlens=cu_seqlens_of(lengths))


def assert_equal_by_name(
    found: dict[str, Tensor], expected: dict[str, Tensor], atol: float
) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        torch.testing.assert_close(
            x.double(),
            expected[name].double(),
            rtol=0,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, chunk_size=st.sampled_from([1, 2, 7, 16, 64]), with_state=st.booleans())
def test_chunked_equals_recurrence_in_fp64(
    lengths: tuple[int, ...], chunk_size: int, with_state: bool
) -> None:
    inputs = make_inputs(lengths)
    if not with_state:
        del inputs["initial_state"]
    expected = recurrent(inputs, lengths)
    assert_equal_by_name(chunked(inputs, lengths, chunk_size), expected, TIGHT_FP64)


@pytest.mark.parametrize("lengths", [(200,), (5, 64, 1, 63, 65), (1, 1, 1), (128, 64)])
def test_default_chunks_equal_recurrence_in_fp64(lengths: tuple[int, ...]) -> None:
    inputs = make_inputs(lengths)
    assert_equal_by_name(chunked(inputs, lengths), recurrent(inputs, lengths), TIGHT_FP64)


@settings(max_examples=15, deadline=None)
@given(lengths=LENGTHS)
def test_blocks_of_blocks_of_chunks_equal_recurrence(lengths: tuple[int, ...]) -> None:
    inputs = make_inputs(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning_chunked, "SCAN_BLOCK", 3)
        found = chunked(inputs, lengths, chunk_size=2)
    assert_equal_by_name(found, recurrent(inputs, lengths), TIGHT_FP64)


@pytest.mark.parametrize("lengths", [(300,), (20,) * 15, (1, 199, 100)])
def test_fp32_is_within_rounding_of_the_fp64_recurrence(lengths: tuple[int, ...]) -> None:
    inputs = make_inputs(lengths, torch.float32)
    found = chunked(inputs, lengths)
    expected = recurrent({name: x.double() for name, x in inputs.items()}, lengths)
    for name, x in found.items():
        assert x.dtype == torch.float32, name
        atol = RELATIVE_FP32 * float(expected[name].abs().max())
        assert float((x - expected[name]).abs().max()) <= atol, name


def test_bf16_is_rounded_once_from_fp32() -> None:
    lengths = (150, 30)
    inputs = make_inputs(lengths, torch.bfloat16)
    found = chunked(inputs, lengths)
    assert found["final_state"].dtype == torch.float32
    expected = recurrent({name: x.double() for name, x in inputs.items()}, lengths)
    for name, x in found.items():
        assert name == "final_state" or x.dtype == torch.bfloat16, name
        atol = RELATIVE_FP32 * float(expected[name].abs().max())
        torch.testing.assert_close(x.double(), expected[name], rtol=ROUNDING_BF16, atol=atol)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), lengths=st.lists(st.integers(1, 90), min_size=2, max_size=6).map(tuple))
def test_a_document_is_bit_equal_whatever_its_neighbours_hold(
    data: st.DataObject, lengths: tuple[int, ...]
) -> None:
    changed = data.draw(st.integers(0, len(lengths) - 1))
    start, end = cu_seqlens_of(lengths)[changed : changed + 2].tolist()
    inputs = make_inputs(lengths, torch.float32)
    others = make_inputs(lengths, torch.float32, seed=2)
    for name in ("q", "k", "v"):
        others[name] = torch.cat(
            [inputs[name][:start], 1e3 * others[name][start:end], inputs[name][end:]]
        )
    others["initial_state"] = inputs["initial_state"].clone()
    others["initial_state"][changed] *= 1e3
    found, again = chunked(inputs, lengths), chunked(others, lengths)
    for name, x in found.items():
        per_token = x.shape[0] == sum(lengths)
        kept = torch.ones(x.shape[0], dtype=torch.bool)
        kept[slice(start, end) if per_token else changed] = False
        assert torch.equal(x[kept], again[name][kept]), name
        assert not torch.equal(x[~kept], again[name][~kept]), name


@pytest.mark.parametrize("num_chunks", [10, 200])
def test_a_token_reaches_the_whole_rest_of_its_document_and_nothing_else(num_chunks: int) -> None:
    lengths = (16, 16 * num_chunks, 16)
    inputs = make_inputs(lengths)
    slopes = torch.full((HEADS,), 1e-4)
    source = torch.tensor(20)
    k, v = torch.zeros_like(inputs["k"]), inputs["v"].clone()
    k[source] = inputs["k"][source]
    output, _ = lightning_attention(
        inputs["q"], k, v, slopes, cu_seqlens=cu_seqlens_of(lengths), chunk_size=16
    )
    age = torch.arange(sum(lengths)) - source
    weight = torch.exp(-slopes[0].double() * age) * (age >= 0) * (age < 16 * num_chunks - 4)
    scores = (inputs["q"] * k[source]).sum(-1) * KEY_DIM**-0.5 * weight[:, None]
    torch.testing.assert_close(output, scores[..., None] * v[source], rtol=0, atol=TIGHT_FP64)


def test_steep_slopes_and_long_rows_stay_finite() -> None:
    q = torch.ones(5000, 2, KEY_DIM)
    slopes = torch.tensor([60.0, 1e-3])
    output, state = lightning_attention(
        q, q, q, slopes, cu_seqlens=cu_seqlens_of((5000,)), scale=1.0, output_final_state=True
    )
    assert bool(output.isfinite().all())
    torch.testing.assert_close(output[:, 0], torch.full((5000, KEY_DIM), float(KEY_DIM)))
    assert state is not None
    horizon = (1 - torch.exp(torch.tensor(-5.0))) / (1 - torch.exp(torch.tensor(-1e-3)))
    torch.testing.assert_close(state[0, 1], horizon.expand(KEY_DIM, KEY_DIM), rtol=1e-4, atol=0)


def test_states_carry_a_document_over_a_cut() -> None:
    inputs = make_inputs((90,))
    whole = chunked(inputs, (90,))
    slopes = decay_slopes(HEADS, 1, 4, "zero_based", dtype=torch.float64)
    outputs, state = [], inputs["initial_state"]
    for part in (slice(0, 37), slice(37, 90)):
        q, k, v = (inputs[name][part] for name in ("q", "k", "v"))
        output, state = lightning_attention(
            q,
            k,
            v,
            slopes,
            cu_seqlens=cu_seqlens_of((q.shape[0],)),
            initial_state=state,
            output_final_state=True,
        )
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs), whole["output"], rtol=0, atol=TIGHT_FP64)
    torch.testing.assert_close(state, whole["final_state"], rtol=0, atol=TIGHT_FP64)


def test_decode_steps_equal_the_chunked_form() -> None:
    length = 70
    inputs = make_inputs((length,))
    slopes = decay_slopes(HEADS, 1, 4, "zero_based", dtype=torch.float64)
    whole = chunked(inputs, (length,))
    state, outputs = inputs["initial_state"].clone(), []
    for token in range(length):
        q, k, v = (inputs[name][token : token + 1] for name in ("q", "k", "v"))
        outputs.append(lightning_attention_step(q, k, v, slopes, state))
    torch.testing.assert_close(torch.cat(outputs), whole["output"], rtol=0, atol=TIGHT_FP64)
    torch.testing.assert_close(state, whole["final_state"], rtol=0, atol=TIGHT_FP64)


def test_a_state_of_another_dtype_is_refused() -> None:
    q, state = torch.zeros(2, HEADS, 4), torch.zeros(2, HEADS, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="keep it in"):
        lightning_attention_step(q, q, q, torch.ones(HEADS), state)


def test_scale_multiplies_the_output_and_defaults_to_the_head_dim() -> None:
    inputs = make_inputs((20,))
    slopes = decay_slopes(HEADS, 1, 4, "zero_based")
    del inputs["initial_state"]
    options: dict[str, Any] = {"slopes": slopes, "cu_seqlens": cu_seqlens_of((20,))}
    options |= inputs
    plain, no_state = lightning_attention(**options)
    assert no_state is None
    unit, _ = lightning_attention(**options, scale=1.0)
    torch.testing.assert_close(plain, unit * KEY_DIM**-0.5, rtol=0, atol=TIGHT_FP64)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"k": torch.zeros(9, HEADS, KEY_DIM)}, r"are not \[t, n, d\]"),
        ({"v": torch.zeros(10, HEADS + 1, VALUE_DIM)}, r"are not \[t, n, d\]"),
        ({"q": torch.zeros(10, HEADS * KEY_DIM)}, r"are not \[t, n, d\]"),
        ({"k": torch.zeros(10, HEADS, KEY_DIM).double()}, "cast them to one dtype"),
        ({"slopes": torch.ones(HEADS + 1)}, "do not match the 3 heads"),
        ({"initial_state": torch.zeros(1, HEADS, KEY_DIM, VALUE_DIM)}, "one state per document"),
        ({"initial_documents": (1, 0)}, "not ascending numbers of 2 documents"),
        ({"initial_documents": (0, 2)}, "not ascending numbers of 2 documents"),
        ({"initial_documents": (0, 0)}, "not ascending numbers of 2 documents"),
        ({"initial_documents": (0,)}, "one state per document"),
        ({"initial_documents": (0, 1), "initial_state": None}, "give both or none"),
        ({"cu_seqlens": torch.tensor([0, 7, 3, 10])}, "rise strictly"),
        ({"cu_seqlens": torch.tensor([0, 7, 11])}, "rise strictly"),
        ({"lengths": (5, 5)}, "differ from those"),
        ({"chunk_size": 0}, "not positive"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, Any], match: str) -> None:
    inputs = make_inputs((7, 3), torch.float32) | {"slopes": torch.ones(HEADS)}
    options = {"cu_seqlens": torch.tensor([0, 7, 10])}
    with pytest.raises(ValueError, match=match):
        inspect.unwrap(lightning_attention)(**(inputs | options | change))


def test_dtypes_without_an_accumulation_are_refused() -> None:
    q = torch.zeros(4, HEADS, KEY_DIM, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"int64 is not supported"):
        inspect.unwrap(lightning_attention)(
            q, q, q, torch.ones(HEADS), cu_seqlens=torch.tensor([0, 4])
        )
