"""Low-rank adapters by the trainer's names, and the weights that they are added to.

The adapter of `NAME.weight` is `NAME.lora_a` [r, in] and `NAME.lora_b` [out, r], rows in the order
of the weight's; it means weight + scale * B A.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
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


def adapted_names(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return (names of weights and biases, those of them that have an adapter)."""
    found = set(names)
    adapted = [name.removesuffix(A) + WEIGHT for name in found if name.endswith(A)]
    plain = {name for name in found if not name.endswith((A, B))}
    assert set(adapted) <= plain
    return sorted(plain), sorted(adapted)


def read_adapter(name: str, read: Callable[[str], Tensor]) -> Adapter:
    """Return the adapter of a weight."""
    stem = name.removesuffix(WEIGHT)
    return Adapter(read(stem + A), read(stem + B))


def read_merged(
    name: str, read: Callable[[str], Tensor], adapted: Container[str], scale: float
) -> Tensor:
    """Return a weight; one with an adapter as W + scale * B A in fp32, added up in fp64."""
    weight = read(name)
    if name not in adapted:
        return weight
    adapter = read_adapter(name, read)
    merged = (adapter.b.double() @ adapter.a.double()).mul_(scale).add_(weight)
    return merged.float()
