"""The state of a run of tokens: its value, its gradients, and what is kept for them."""

import torch

from ring_train.ops.lightning import lightning_attention_recurrent_reference
from ring_train.ops.lightning_state import run_state

RATES = torch.tensor([0.84, 1e-4], dtype=torch.float64)


def make_run(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys [9, 2, 4] and values [9, 2, 3]."""
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(9, 2, 7, generator=generator).to(dtype).split([4, 3], dim=2)
    return k.clone().requires_grad_(), v.clone().requires_grad_()


def test_it_is_the_state_of_the_recurrence() -> None:
    k, v = make_run(torch.float64)
    _, states = lightning_attention_recurrent_reference(
        k, k, v, RATES, cu_seqlens=torch.tensor([0, 9])
    )
    torch.testing.assert_close(run_state(k, v, RATES), states[0], rtol=0, atol=1e-14)


def test_gradients_are_those_of_differences() -> None:
    k, v = make_run(torch.float64)
    assert torch.autograd.gradcheck(lambda k, v: run_state(k, v, RATES), (k, v))


def test_bf16_is_widened_once_and_kept_as_it_is() -> None:
    k, v = make_run(torch.bfloat16)
    kept = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.dtype)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        state = run_state(k, v, RATES)
    assert torch.float32 not in kept
    wide = [x.detach().float().requires_grad_() for x in (k, v)]
    expected = run_state(wide[0], wide[1], RATES)
    assert state.dtype == torch.float32
    assert torch.equal(state, expected)
    weights = torch.randn(state.shape, generator=torch.Generator().manual_seed(1))
    found = torch.autograd.grad((state * weights).sum(), (k, v))
    wanted = torch.autograd.grad((expected * weights).sum(), wide)
    for x, y in zip(found, wanted, strict=True):
        assert torch.equal(x, y.bfloat16())
