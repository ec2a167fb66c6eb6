"""The Triton kernels of lightning attention, interpreted, against the token recurrence."""

import inspect
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_train.ops.kernels import lightning_states
from ring_train.ops.lightning import (
    lightning_attention,
    lightning_attention_recurrent_reference,
)

RELATIVE_FP32 = 3e-6  # of the largest value: about 20 roundings of 6e-8 in a row of sums
RELATIVE_FP16 = 3e-3  # of the largest value: keys, scores and result rounded to 2^-11 each
DRIFT_FP32 = (
    3e-5  # a decay rounded to 6e-8 once, applied to 128 chunks in a row; sums of 1024 terms
)

SLOPES = (0.84, 0.03, 1e-4)
HEADS = len(SLOPES)
PROGRAMS = {"one segment": 1, "two chunks a segment": 6, "a chunk a segment": 264}


def cu_seqlens_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def make_inputs(
    lengths: tuple[int, ...], dims: tuple[int, int], seed: int = 0, heads: int = HEADS
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    d, dv = dims
    shapes = {
        "q": (sum(lengths), heads, d),
        "k": (sum(lengths), heads, d),
        "v": (sum(lengths), heads, dv),
        "initial_state": (len(lengths), heads, d, dv),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def run(
    attention: Any,
    inputs: dict[str, Tensor],
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    slopes: tuple[float, ...] = SLOPES,
    **options: Any,
) -> dict[str, Tensor]:
    """Return output, final state if there is one, and the gradients of a fixed functional."""
    leaves = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    tokens = {name: leaves[name] for name in ("q", "k", "v")}
    output, state = attention(
        **tokens,
        slopes=torch.tensor(slopes, dtype=torch.float64),
        cu_seqlens=cu_seqlens_of(lengths),
        initial_state=leaves.get("initial_state"),
        **options,
    )
    found = {"output": output} if state is None else {"output": output, "final_state": state}
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for x in found.values():
        loss = loss + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found |= {f"grad of {name}": x for name, x in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def triton(
    inputs: dict[str, Tensor], lengths: tuple[int, ...], **options: Any
) -> dict[str, Tensor]:
    defaults = dict[str, Any](dtype=torch.float32, output_final_state=True, chunk_size=32)
    defaults |= {"backend": "triton"}
    return run(lightning_attention, inputs, lengths, **(defaults | options))


def recurrent(
    inputs: dict[str, Tensor], lengths: tuple[int, ...], **options: Any
) -> dict[str, Tensor]:
    options = dict[str, Any](dtype=torch.float64) | options
    return run(lightning_attention_recurrent_reference, inputs, lengths, **options)


def assert_close_by_name(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float
) -> None:
    assert found.keys() == expected.keys()
    for name, x in found.items():
        error = (x.double() - expected[name]).abs().max() / expected[name].abs().max()
        assert float(error) <= tolerance, f"{name}: {float(error):.1e} of the largest value"


@pytest.mark.parametrize(
    ("lengths", "programs"),
    [
        ((1,), "one segment"),
        ((33,), "a chunk a segment"),
        ((150,), "two chunks a segment"),
        ((32, 64), "one segment"),
        ((32, 64), "a chunk a segment"),
        ((31, 66, 2), "one segment"),
        *(((5, 20, 1, 1, 40, 70, 3), name) for name in PROGRAMS),
    ],
)
def test_values_and_gradients_equal_the_recurrence(
    lengths: tuple[int, ...], programs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightning_states, "PROGRAMS", PROGRAMS[programs])
    inputs = make_inputs(lengths, (12, 20))
    assert_close_by_name(triton(inputs, lengths), recurrent(inputs, lengths), RELATIVE_FP32)


@pytest.mark.parametrize("lengths", [(70,), (9, 30, 33)])
def test_without_states_of_documents(lengths: tuple[int, ...]) -> None:
    inputs = make_inputs(lengths, (16, 16))
    del inputs["initial_state"]
    found = triton(inputs, lengths, output_final_state=False)
    expected = run(lightning_attention, inputs, lengths, torch.float64, backend="torch")
    assert_close_by_name(found, expected, RELATIVE_FP32)


def test_only_initial_or_only_final_states() -> None:
    lengths = (40, 3, 50)
    inputs = make_inputs(lengths, (16, 8))
    torch_options: dict[str, Any] = {"dtype": torch.float64, "backend": "torch"}
    expected = run(lightning_attention, inputs, lengths, **torch_options)
    found = triton(inputs, lengths, output_final_state=False)
    assert_close_by_name(found, expected, RELATIVE_FP32)
    del inputs["initial_state"]
    torch_options["output_final_state"] = True
    expected = run(lightning_attention, inputs, lengths, **torch_options)
    assert_close_by_name(triton(inputs, lengths), expected, RELATIVE_FP32)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("documents", [(0,), (1, 3), (0, 1, 2, 3, 4)])
def test_initial_states_of_some_documents(documents: tuple[int, ...], backend: str) -> None:
    """As with zeros for the others."""
    lengths = (40, 3, 50, 10, 10)
    inputs = make_inputs(lengths, (16, 8))
    chosen = list(documents)
    inputs["initial_state"][[i for i in range(5) if i not in documents]] = 0.0
    some = inputs | {"initial_state": inputs["initial_state"][chosen]}
    found = triton(some, lengths, backend=backend, initial_documents=documents)
    expected = triton(inputs, lengths, backend=backend)
    expected["grad of initial_state"] = expected["grad of initial_state"][chosen]
    for name, x in found.items():
        assert torch.equal(x, expected[name]), name


def test_of_initial_states_those_given_are_kept() -> None:
    """A row of many documents, of which one continues another rank's, keeps one."""
    lengths = (40, 3, 50, 10, 10)
    inputs = make_inputs(lengths, (16, 8))
    inputs["initial_state"] = inputs["initial_state"][:1]
    kept = []

    def keep(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        triton(inputs, lengths, initial_documents=(0,), output_final_state=False)
    assert (1, HEADS, 16, 8) in kept
    assert (5, HEADS, 16, 8) not in kept


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (24, 100)])
def test_head_dims_of_the_models_and_odd_ones(dims: tuple[int, int]) -> None:
    lengths = (50, 30)
    inputs = make_inputs(lengths, dims)
    assert_close_by_name(triton(inputs, lengths), recurrent(inputs, lengths), RELATIVE_FP32)


def test_decays_from_nearly_none_to_nearly_total() -> None:
    """exp(100) is no number of fp32, and exp(-1e-6) is 1 but for rounding."""
    lengths = (60, 45)
    inputs = make_inputs(lengths, (16, 16))
    slopes = (100.0, 1e-6, 5.0)
    found = triton(inputs, lengths, slopes=slopes)
    assert_close_by_name(found, recurrent(inputs, lengths, slopes=slopes), RELATIVE_FP32)


def test_gradients_of_8k_tokens() -> None:
    lengths = (5_000, 3_192)
    inputs = make_inputs(lengths, (4, 4), heads=1)
    options: dict[str, Any] = {"output_final_state": True, "slopes": (1e-4,)}
    expected = run(lightning_attention, inputs, lengths, torch.float64, backend="torch", **options)
    found = triton(inputs, lengths, chunk_size=512, **options)
    assert_close_by_name(found, expected, DRIFT_FP32)


def test_values_of_128k_tokens() -> None:
    """Forward only: the interpreter takes minutes for the gradients, which tests/gpu looks at."""
    lengths = (100_000, 31_072)
    inputs = make_inputs(lengths, (4, 4), heads=1)
    found = {}
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        output, state = lightning_attention(
            *(inputs[name].to(dtype) for name in ("q", "k", "v")),
            slopes=torch.tensor([1e-4]),
            cu_seqlens=cu_seqlens_of(lengths),
            initial_state=inputs["initial_state"].to(dtype),
            output_final_state=True,
            chunk_size=1024,
            backend=backend,
        )
        assert state is not None
        found[backend] = {"output": output, "final_state": state}
    assert_close_by_name(found["triton"], found["torch"], DRIFT_FP32)


def test_fp16_is_within_its_rounding() -> None:
    lengths = (70, 20)
    inputs = {name: x.half() for name, x in make_inputs(lengths, (32, 16)).items()}
    found = triton(inputs, lengths, dtype=torch.float16)
    assert found["output"].dtype == found["grad of k"].dtype == torch.float16
    assert found["final_state"].dtype == torch.float32
    assert_close_by_name(found, recurrent(inputs, lengths), RELATIVE_FP16)


def test_two_runs_are_bit_equal_and_strides_do_not_matter() -> None:
    lengths = (40, 57)
    inputs = make_inputs(lengths, (16, 16))
    qkv = torch.stack([inputs[name].float() for name in ("q", "k", "v")], dim=2)
    options: dict[str, Any] = {
        "slopes": torch.tensor(SLOPES),
        "cu_seqlens": cu_seqlens_of(lengths),
        "backend": "triton",
        "chunk_size": 16,
    }
    apart, _ = lightning_attention(*(x.contiguous() for x in qkv.unbind(2)), **options)
    inside, _ = lightning_attention(*qkv.unbind(2), **options)
    across = (x.contiguous().mT.contiguous().mT for x in qkv.unbind(2))
    turned, _ = lightning_attention(*across, **options)
    assert torch.equal(apart, inside)
    assert torch.equal(apart, turned)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what overflows is not looked at
def test_a_document_is_bit_equal_whatever_its_neighbours_hold() -> None:
    lengths = (20, 33, 30)
    inputs, others = make_inputs(lengths, (8, 8)), make_inputs(lengths, (8, 8), seed=2)
    inside = slice(20, 53)
    for name, x in others.items():
        at = slice(1, 2) if name == "initial_state" else inside
        others[name] = inputs[name].clone()
        others[name][at] = 1e30 * x[at]
    found, again = triton(inputs, lengths), triton(others, lengths)
    tokens, documents = torch.ones(83, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    tokens[inside] = documents[1] = False
    for name, x in found.items():
        kept = documents if "state" in name else tokens
        assert torch.equal(x[kept], again[name][kept]), name
        assert not torch.equal(x[~kept], again[name][~kept]), name


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": torch.zeros(6, 3, 256), "k": torch.zeros(6, 3, 256)}, "head dims up to 128"),
        ({"chunk_size": 24}, "power of two from 16"),
        ({"chunk_size": 8}, "power of two from 16"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
        ({name: torch.zeros(6, 3, 8).double() for name in "qkv"}, "does not compute"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, "rise strictly"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "rise strictly"),
        ({"initial_state": torch.zeros(2, 3, 8, 8)}, "one state per document"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, Any], match: str) -> None:
    inputs: dict[str, Any] = {name: torch.zeros(6, 3, 8) for name in "qkv"}
    inputs |= {"slopes": torch.tensor(SLOPES), "cu_seqlens": torch.tensor([0, 6])}
    with pytest.raises(ValueError, match=match):
        inspect.unwrap(lightning_attention)(**(inputs | {"backend": "triton"} | change))


@pytest.mark.parametrize("backend", ["triton", "fla"])
def test_kernels_of_a_gpu_are_refused_on_the_cpu(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    x = torch.zeros(6, 3, 8)
    with pytest.raises(ValueError, match="needs tensors on a GPU, these are on cpu"):
        lightning_attention(
            x, x, x, torch.tensor(SLOPES), cu_seqlens=torch.tensor([0, 6]), backend=backend
        )
