"""Low-rank adapters by the trainer's names, and the weights that they are added to.

The adapter of `NAME.weight` is `NAME.lora_a` [r, in] and `NAME.lora_b` [out, r], rows in the order
of the weight's; it means weight + scale * B A.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

WEIGHT, A, B = ".weight", ".lora_a", ".lora_b"


@dataclass(frozen=True)
class Adapter:
    """One low-rank product."""

    a: Tensor
    """[r, in]."""
    b: Tensor
    """[out, r]."""


def split_adapters(
    tensors: Iterable[tuple[str, Tensor]],
) -> tuple[dict[str, Tensor], dict[str, Adapter]]:
    """Return (weights and biases, adapters by the name of the weight that they belong to)."""
    named = dict(tensors)
    adapters = {
        name.removesuffix(A) + WEIGHT: Adapter(named.pop(name), named.pop(name.removesuffix(A) + B))
        for name in [name for name in named if name.endswith(A)]
    }
    assert not [name for name in named if name.endswith(B)]
    assert adapters.keys() <= named.keys()
    return named, adapters


def merged_weights(
    weights: dict[str, Tensor], adapters: dict[str, Adapter], scale: float
) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight, those with an adapter as W + scale * B A, added up in fp64."""
    for name, weight in weights.items():
        adapter = adapters.get(name)
        if adapter is None:
            yield name, weight
        else:
            product = adapter.b.detach().double() @ adapter.a.detach().double()
            yield name, (weight.detach().double() + scale * product).to(weight.dtype)
