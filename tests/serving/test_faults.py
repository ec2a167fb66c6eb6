"""Faults that load without complaint move log-probabilities far beyond the tolerance.

Not here: a missing 1/sqrt(d), which the norm behind the recurrence takes out again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ring_linear_vllm import attention
from ring_linear_vllm.attention import RingLinearAttention
from ring_linear_vllm.engine import build_engine, close_engine, decode_logprobs, prompt_logprobs

from tests.serving.conftest import NUM_BLOCKS
from tests.serving.folders import expected, longest_prompt
from tests.serving.test_golden import CHUNK_TOKENS, largest_difference

NOTICED = 1e-2
"""A hundred times the tolerance of the golden tests."""

Patch = pytest.MonkeyPatch


def wrap(patch: Patch, name: str, change: Callable[..., Any]) -> None:
    """Replace a function of the layer's module by change(function, *args, **kwargs)."""
    function = getattr(attention, name)
    patch.setattr(attention, name, lambda *args, **kwargs: change(function, *args, **kwargs))


def slopes_of_the_next_layer(patch: Patch) -> None:
    wrap(patch, "decay_slopes", lambda slopes, config, index: slopes(config, index + 1))


def slopes_in_reverse(patch: Patch) -> None:
    wrap(patch, "decay_slopes", lambda slopes, config, index: slopes(config, index)[::-1])


def rope_on_all_channels(patch: Patch) -> None:
    def change(get_rope: Any, size: int, rope_parameters: dict, **kwargs: Any) -> Any:
        return get_rope(
            size, rope_parameters={**rope_parameters, "partial_rotary_factor": 1.0}, **kwargs
        )

    wrap(patch, "get_rope", change)


def interleaved_rope(patch: Patch) -> None:
    def change(get_rope: Any, size: int, is_neox_style: bool, **kwargs: Any) -> Any:
        return get_rope(size, is_neox_style=not is_neox_style, **kwargs)

    wrap(patch, "get_rope", change)


def forgotten_state(patch: Patch) -> None:
    wrap(patch, "lightning_attention", lambda attend, *args: attend(*args[:4], args[4] * 0))


def stale_state(patch: Patch) -> None:
    patch.setattr(RingLinearAttention, "clear_states", lambda self, slots: None)


class OtherNorm:
    """The norm with one argument changed where it also gates."""

    def __init__(self, **change: Any) -> None:
        self.change = change
        self.forward_static_right = attention.RMSNormGated.forward_static

    def forward_static(self, x: Any, gate: Any, *args: Any, **kwargs: Any) -> Any:
        if gate is not None:
            kwargs |= self.change
        return self.forward_static_right(x, gate, *args, **kwargs)


def one_group(patch: Patch) -> None:
    patch.setattr(attention, "RMSNormGated", OtherNorm(group_size=None))


def silu_gate(patch: Patch) -> None:
    patch.setattr(attention, "RMSNormGated", OtherNorm(activation="silu"))


def gate_before_norm(patch: Patch) -> None:
    patch.setattr(attention, "RMSNormGated", OtherNorm(norm_before_gate=False))


FAULTS = [
    *(slopes_of_the_next_layer, slopes_in_reverse, rope_on_all_channels, interleaved_rope),
    *(forgotten_state, stale_state, one_group, silu_gate, gate_before_norm),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_noticed(
    folders: dict[str, Path], monkeypatch: Patch, fault: Callable[[Patch], None]
) -> None:
    fault(monkeypatch)
    golden = expected("zero_based")
    engine = build_engine(
        str(folders["zero_based"]),
        max_tokens=longest_prompt() + 1,
        chunk_tokens=CHUNK_TOKENS,
        num_gpu_blocks_override=NUM_BLOCKS,
    )
    try:
        rows = [prompt_logprobs(engine, golden["prompts"]) for _ in range(2)]
        rows.append(decode_logprobs(engine, golden["prompts"]))
    finally:
        close_engine(engine)
    assert max(largest_difference(got, golden["logprobs"]) for got in rows) > NOTICED
