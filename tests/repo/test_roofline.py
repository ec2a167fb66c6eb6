"""Arithmetic of bench/roofline.py against figures worked out by hand, and against our kernels."""

import pytest
import torch

from bench import roofline
from ring_train.ops.kernels.lightning_states import Row, chunk_size_for, make_states


def test_flops_of_a_token() -> None:
    # d = 128, c = 64: 16 K + 64 K and 40 K + 160 K.
    assert roofline.forward_flops(1, 128) == 81_920
    assert roofline.backward_flops(1, 128) == 204_800


@pytest.mark.parametrize(
    ("heads", "tokens", "forward_us", "backward_us"),
    [(16, 4096, 22, 39), (32, 32768, 358, 626), (32, 131072, 1432, 2505)],
)
def test_floors_at_3_tb_per_s(heads: int, tokens: int, forward_us: int, backward_us: int) -> None:
    forward = heads * roofline.ideal_bytes(tokens, 128, 2, backward=False) / 3e12
    both = heads * roofline.ideal_bytes(tokens, 128, 2, backward=True) / 3e12
    assert forward * 1e6 == pytest.approx(forward_us, abs=0.5)
    assert (both - forward) * 1e6 == pytest.approx(backward_us, abs=0.5)


def test_units_moved() -> None:
    assert roofline.two_pass_units(128, 128, 2, 2) == [8, 12]
    assert roofline.two_pass_units(128, 64, 2, 2) == [10, 15]
    assert roofline.two_pass_units(128, 64, 4, 2) == [14, 21]  # fp16, whose states are fp32
    assert roofline.fla_units(128) == [10, 34]
    assert roofline.reachable_fraction([8, 12]) == pytest.approx(0.55)
    assert roofline.reachable_fraction([10, 34]) == pytest.approx(0.25)


@pytest.mark.parametrize(("dtype", "chunk"), [(torch.bfloat16, 128), (torch.float16, 64)])
def test_our_states_are_as_large_as_the_arithmetic_says(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_states_kernel", "_carry_kernel"):
        monkeypatch.setitem(make_states.__globals__, name, NoLaunch())
    k = torch.empty(4096, 2, 128, dtype=dtype, device="meta")
    assert chunk_size_for(k) == chunk
    row = Row(torch.empty(2, device="meta"), None, None, 1.0, chunk)
    states, _ = make_states(k, k, row, initial=None, with_final=False, reverse=False)
    local = states.local
    units = roofline.state_units(128, chunk, local.element_size(), k.element_size())
    assert local.numel() * local.element_size() == units * k.numel() * k.element_size()


class NoLaunch:
    """A kernel that does nothing."""

    def __getitem__(self, grid: object) -> "NoLaunch":
        return self

    def __call__(self, *args: object, **options: object) -> None:
        pass
