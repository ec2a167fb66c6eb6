"""Split, QK-norm and partial RoPE: what the torch path composes, and the Triton kernels with it."""

import inspect
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ring_train.ops import norm
from ring_train.ops.kernels import qk_norm_rope as kernels
from ring_train.ops.norm import rms_norm
from ring_train.ops.qk_norm_rope import split_qk_norm_rope
from ring_train.ops.rope import apply_partial_rope, rotary_angles

EPS = 1e-6
RELATIVE_FP32 = 1e-6  # of the largest value: a few roundings of 6e-8, sums of up to 100 terms
RELATIVE_FP16 = 3e-3  # of the largest value: up to five roundings to 2^-11 each
SAME_FRACTION = 0.999  # values equal bit by bit: rsqrt and sums may round otherwise, rarely


class Case(NamedTuple):
    """Sizes of a test."""

    tokens: int
    groups: int
    queries: int
    """Of a group."""
    head_dim: int
    rotary_dim: int


CASES = {
    "lightning, half of a head turns": Case(2, 5, 1, 8, 4),
    "whole heads turn": Case(3, 1, 1, 64, 64),
    "grouped queries": Case(3, 2, 3, 16, 8),
    "released head": Case(3, 1, 1, 128, 64),
    "sizes that fill no block": Case(11, 1, 2, 24, 12),
    "one pair turns": Case(1, 1, 2, 10, 2),
}


def make_inputs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    t, g, queries, d, r = case
    shapes = {"qkv": (t, g, queries + 2, d), "q_weight": (d,), "k_weight": (d,)}
    inputs = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }
    # No two channels turn alike here, though those of a model do in pairs.
    angles = torch.randn((t, r), generator=generator, dtype=torch.float64)
    angles = angles.to(torch.promote_types(dtype, torch.float32))
    return inputs | {"cos": angles.cos(), "sin": angles.sin()}


def run(
    inputs: dict[str, Tensor], *, norm: bool = True, silu: bool = False, backend: str = "torch"
) -> dict[str, Tensor]:
    """Return q, k, v and the gradients of a fixed functional of them."""
    names = ("qkv", "q_weight", "k_weight") if norm else ("qkv",)
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    weights = (leaves["q_weight"], leaves["k_weight"]) if norm else None
    heads = split_qk_norm_rope(
        leaves["qkv"],
        weights,
        inputs["cos"],
        inputs["sin"],
        eps=EPS,
        silu=silu,
        backend=backend,
    )
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for x in heads:
        loss = loss + (x * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = dict(zip("qkv", heads, strict=True))
    found |= {f"grad of {name}": x for name, x in zip(leaves, grads, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float) -> None:
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        error = (x.double() - wanted[name].double()).abs().max()
        assert error <= relative * wanted[name].abs().max(), (name, float(error))


def test_torch_takes_the_norms_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the fastest that the device has: it is what Triton is held to there."""
    asked = []

    def resolve(backend: str, x: Tensor) -> str:
        asked.append(backend)
        return "torch"

    monkeypatch.setattr(norm, "resolve_backend", resolve)
    run(make_inputs(CASES["grouped queries"], torch.float32), backend="torch")
    assert asked == ["torch", "torch"]


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_torch_rounds_as_its_parts_do_one_by_one(case: Case, silu: bool) -> None:
    inputs = make_inputs(case, torch.bfloat16)
    qkv, angles = inputs["qkv"], (inputs["cos"], inputs["sin"])
    weights = inputs["q_weight"], inputs["k_weight"]
    qkv = torch.nn.functional.silu(qkv) if silu else qkv
    last = case.queries
    queries = [qkv[:, g, i] for g in range(case.groups) for i in range(last)]
    q, k, v = torch.stack(queries, 1), qkv[:, :, last], qkv[:, :, last + 1]
    found = run(inputs, silu=silu)
    assert torch.equal(found["q"], apply_partial_rope(rms_norm(q, weights[0], EPS), *angles))
    assert torch.equal(found["k"], apply_partial_rope(rms_norm(k, weights[1], EPS), *angles))
    assert torch.equal(found["v"], v)
    bare = run(inputs, silu=silu, norm=False)
    assert torch.equal(bare["q"], apply_partial_rope(q, *angles))


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_triton_equals_torch_in_fp64(case: Case, norm: bool) -> None:
    inputs = make_inputs(case, torch.float64)
    narrow = {name: x.float() for name, x in inputs.items()}
    for silu in (False, True) if case.head_dim < 64 else (True,):
        found = run(narrow, norm=norm, silu=silu, backend="triton")
        assert_close(found, run(inputs, norm=norm, silu=silu), RELATIVE_FP32)
        assert all(x.is_contiguous() for x in found.values())


def test_a_program_sums_over_blocks_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS", 5)  # two for each of three kinds
    case = Case(2 * kernels.ROWS + 1, 1, 1, 4, 2)  # three blocks
    inputs = make_inputs(case, torch.float64)
    narrow = {name: x.float() for name, x in inputs.items()}
    assert_close(run(narrow, backend="triton"), run(inputs), RELATIVE_FP32)


def test_triton_rounds_where_torch_does() -> None:
    inputs = make_inputs(Case(8, 2, 1, 128, 64), torch.float16)
    found, wanted = run(inputs, silu=True, backend="triton"), run(inputs, silu=True)
    for name in "qkv":
        assert (found[name] == wanted[name]).double().mean() >= SAME_FRACTION, name
    assert_close(found, wanted, RELATIVE_FP16)


def test_weights_keep_their_dtype_beside_narrow_heads() -> None:
    inputs = make_inputs(CASES["sizes that fill no block"], torch.float16)
    inputs |= {name: inputs[name].float() for name in ("q_weight", "k_weight")}
    found, wanted = run(inputs, backend="triton"), run(inputs)
    assert found["grad of q_weight"].dtype == torch.float32
    assert {n: x.dtype for n, x in found.items()} == {n: x.dtype for n, x in wanted.items()}
    assert_close(found, wanted, RELATIVE_FP16)


def test_inputs_with_gaps_are_read_where_they_lie() -> None:
    inputs = make_inputs(CASES["one pair turns"], torch.float32)
    gaps = dict(inputs)
    for name, x in inputs.items():
        gaps[name] = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))[..., ::2].copy_(x)
        assert not gaps[name].is_contiguous()
    found, wanted = run(gaps, backend="triton"), run(inputs, backend="triton")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_gradients_of_some_outputs_leave_the_others_alone() -> None:
    inputs = make_inputs(CASES["one pair turns"], torch.float32)
    for index in range(3):
        grads = []
        for backend in ("torch", "triton"):
            qkv = inputs["qkv"].clone().requires_grad_()
            heads = split_qk_norm_rope(
                qkv, None, inputs["cos"], inputs["sin"], eps=EPS, backend=backend
            )
            # The gradient that arrives is expanded from one number.
            grads.append(torch.autograd.grad(heads[index].sum(), qkv)[0])
        torch.testing.assert_close(*grads, rtol=0, atol=RELATIVE_FP32)


def test_no_tokens_give_empty_heads() -> None:
    for backend in ("torch", "triton"):
        found = run(make_inputs(Case(0, 2, 2, 8, 4), torch.float32), backend=backend)
        assert [found[name].shape for name in "qkv"] == [(0, 4, 8), (0, 2, 8), (0, 2, 8)]
        assert not found["grad of q_weight"].any()


def test_triton_keeps_only_the_input() -> None:
    inputs = make_inputs(CASES["one pair turns"], torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        run(inputs, backend="triton")
    t, r, d = inputs["cos"].shape[0], inputs["cos"].shape[1], inputs["qkv"].shape[3]
    # The functional of `run` keeps its weights, of the shapes of q, k and v.
    own = [tuple(shape) for shape in kept][:5]
    assert own == [inputs["qkv"].shape, (d,), (d,), (t, r), (t, r)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_auto_on_a_cpu_is_torch(dtype: torch.dtype) -> None:
    inputs = make_inputs(CASES["one pair turns"], dtype)
    found, wanted = run(inputs, backend="auto"), run(inputs, backend="torch")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"qkv": torch.zeros(5, 2, 24)}, r"is not \[t, g, n/g \+ 2, d\]"),
        ({"qkv": torch.zeros(5, 2, 2, 8)}, r"is not \[t, g, n/g \+ 2, d\]"),
        ({"qkv": torch.zeros(5, 2, 3, 8, dtype=torch.int32)}, "is not supported"),
        ({"qkv": torch.zeros(5, 2, 3, 8).double()}, "does not compute torch.float64"),
        ({"qkv": torch.zeros(4, 2, 3, 8)}, "do not fit 4 tokens"),
        ({"qkv": torch.zeros(5, 2, 3, 2)}, "heads of 2 channels"),
        ({"weights": (torch.zeros(8), torch.zeros(4))}, "one weight per channel"),
        ({"cos": torch.zeros(5, 2)}, "do not fit"),
        ({"cos": torch.zeros(5, 3), "sin": torch.zeros(5, 3)}, "an even rotary_dim"),
        ({"cos": torch.zeros(5, 0), "sin": torch.zeros(5, 0)}, "an even rotary_dim"),
        ({"weights": (torch.zeros(8), torch.zeros(8, device="meta"))}, "move them to one device"),
        ({"backend": "cuda"}, "backend='cuda' is unknown"),
    ],
)
def test_wrong_inputs_are_refused(change: dict[str, Any], match: str) -> None:
    inputs: dict[str, Any] = {"qkv": torch.zeros(5, 2, 3, 8), "weights": None}
    inputs |= {"cos": torch.zeros(5, 4), "sin": torch.zeros(5, 4), "eps": EPS, "backend": "triton"}
    with pytest.raises(ValueError, match=match):
        inspect.unwrap(split_qk_norm_rope)(**(inputs | change))


def test_heads_wider_than_registers_are_refused_by_triton_alone() -> None:
    qkv = torch.zeros(1, 1, 3, 258)
    angles = rotary_angles(torch.arange(1), 4, 1e4)
    assert split_qk_norm_rope(qkv, None, *angles, eps=EPS)[0].shape == (1, 1, 258)
    with pytest.raises(ValueError, match="heads of up to 256 channels; choose backend='torch'"):
        split_qk_norm_rope(qkv, None, *angles, eps=EPS, backend="triton")
