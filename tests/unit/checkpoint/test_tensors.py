"""State of inner optimizers: moments by tensor, the number of updates wherever it is kept."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ring_train.checkpoint.tensors import MOMENTS, current_moments, optimizer_step, set_state
from ring_train.platform.cpu import FusedAdam

KINDS = [FusedAdam, torch.optim.AdamW]


def wrapped(inner: torch.optim.Optimizer) -> Any:
    """Return what stands for megatron's optimizer around another."""
    return SimpleNamespace(is_stub_optimizer=False, optimizer=inner)


def make(kind: Any) -> tuple[torch.nn.Parameter, Any]:
    weight = torch.nn.Parameter(torch.ones(4))
    empty: dict[str, Any] = {"params": []}
    return weight, wrapped(kind([{"params": [weight]}, empty], lr=0.1))


def update(weight: torch.nn.Parameter, optimizer: Any, times: int) -> None:
    for number in range(times):
        weight.grad = torch.full((4,), 1.0 + number)
        optimizer.optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_goes_on_from_its_state(kind: Any) -> None:
    weight, optimizer = make(kind)
    assert (optimizer_step(optimizer), current_moments(optimizer)) == (0, {})
    update(weight, optimizer, 3)
    assert optimizer_step(optimizer) == 3
    other, restored = make(kind)
    other.data.copy_(weight.data)
    state = current_moments(optimizer)[weight]
    moments: dict[torch.Tensor, dict[str, torch.Tensor]] = {
        other: {kind: state[kind].clone() for kind in MOMENTS}
    }
    set_state(restored, moments, 3)
    update(weight, optimizer, 2)
    update(other, restored, 2)
    assert optimizer_step(restored) == optimizer_step(optimizer) == 5
    assert other.equal(weight)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_can_be_set_back_to_before_its_first_step(kind: Any) -> None:
    weight, optimizer = make(kind)
    fresh, untouched = make(kind)
    update(weight, optimizer, 3)
    weight.data.fill_(1)
    set_state(optimizer, {}, 0)
    assert (optimizer_step(optimizer), current_moments(optimizer)) == (0, {})
    update(weight, optimizer, 1)
    update(fresh, untouched, 1)
    assert weight.equal(fresh)
