"""All backends of lightning attention on a GPU, held to one fp64 reference."""

from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from ring_train.ops.lightning import lightning_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""L2, relative: inputs of matrix products are rounded to 2^-24 (in three parts), 2^-11 or 2^-9."""
SLOPES = (0.84, 0.11, 0.009, 1e-4)
LENGTHS = {
    "one token": (1,),
    "odd": (4095,),
    "documents": (1, 700, 63, 64, 65, 128, 2048, 5),
    "single tokens": (1,) * 300,
    "long": (131_072,),
}


def run(
    lengths: tuple[int, ...], dim: int, dtype: torch.dtype, backend: str, *, states: bool
) -> dict[str, Tensor]:
    """Return output, final states and every gradient, from inputs exact in bf16."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").bfloat16()

    tokens, heads = sum(lengths), len(SLOPES)
    inputs = {name: draw(tokens, heads, dim).to(dtype) for name in ("q", "k", "v")}
    grad = draw(tokens, heads, dim)
    before, after = (draw(len(lengths), heads, dim, dim) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if states:
        inputs["initial_state"] = before.to(wide)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    output, final = lightning_attention(
        *(leaves[name] for name in ("q", "k", "v")),
        slopes=torch.tensor(SLOPES, dtype=torch.float64, device="cuda"),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda"),
        initial_state=leaves.get("initial_state"),
        output_final_state=states,
        backend=backend,
    )
    loss = (output.to(wide) * grad.to(wide)).sum()
    found = {"output": output}
    if final is not None:
        loss = loss + (final * after.to(wide)).sum()
        found["final_state"] = final
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found |= {f"grad of {name}": x for name, x in zip(leaves, grads, strict=True)}
    return {name: x.detach().double() for name, x in found.items()}


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("backend", ["torch", "triton", "fla"])
def test_values_and_gradients_equal_fp64(
    backend: str, lengths: tuple[int, ...], dtype: torch.dtype, dim: int, states: bool
) -> None:
    if backend == "fla":
        pytest.importorskip("fla", reason="needs flash-linear-attention")
    expected = run(lengths, dim, torch.float64, "torch", states=states)
    for name, x in run(lengths, dim, dtype, backend, states=states).items():
        error = (x - expected[name]).norm() / expected[name].norm()
        assert float(error) <= TOLERANCES[dtype], name


def test_two_runs_are_bit_equal() -> None:
    options: dict[str, Any] = {"states": True, "backend": "triton"}
    first = run(LENGTHS["documents"], 128, torch.bfloat16, **options)
    again = run(LENGTHS["documents"], 128, torch.bfloat16, **options)
    for name, x in first.items():
        assert torch.equal(x, again[name]), name


def test_a_document_is_bit_equal_whatever_its_neighbours_hold() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(300, 4, 128, generator=generator, device="cuda").bfloat16()
    other = x.clone()
    other[100:150] *= 1e30
    bounds = torch.tensor([0, 100, 150, 300], device="cuda")
    outputs = [
        lightning_attention(
            *(y, y, y, torch.tensor(SLOPES, device="cuda")), cu_seqlens=bounds, backend="triton"
        )[0]
        for y in (x, other)
    ]
    kept = torch.ones(300, dtype=torch.bool, device="cuda")
    kept[100:150] = False
    assert torch.equal(outputs[0][kept], outputs[1][kept])
