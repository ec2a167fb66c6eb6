"""Decay slopes: the figures of the model specification, for both layer rules."""

import pytest
import torch

from ring_train.ops.decay import decay_slopes

ROUNDING_FP32 = 1e-7  # one rounding of a float64 value, relative
FIGURE_DIGITS = 5e-7  # the specification prints six decimals


@pytest.mark.parametrize(
    ("rule", "num_layers", "layer_index", "factor"),
    [
        ("zero_based", 20, 0, 1.00001),
        ("zero_based", 20, 1, 1 - 1 / 19 + 1e-5),
        ("zero_based", 20, 18, 0.052642),
        ("zero_based", 32, 0, 1.00001),
        ("zero_based", 32, 1, 1 - 1 / 31 + 1e-5),
        ("zero_based", 32, 30, 0.032268),
        ("shifted", 20, 0, 1 + 1 / 19 + 1e-5),
        ("shifted", 20, 1, 1.00001),
        ("shifted", 20, 18, 0.105273),
        ("shifted", 32, 0, 1 + 1 / 31 + 1e-5),
        ("shifted", 32, 1, 1.00001),
        ("shifted", 32, 30, 0.064526),
        ("zero_based", 1, 0, 1.00001),
        ("shifted", 1, 0, 1.00001),
    ],
)
def test_factor_of_a_layer_is_pinned(
    rule: str, num_layers: int, layer_index: int, factor: float
) -> None:
    slopes = decay_slopes(16, layer_index, num_layers, rule, dtype=torch.float64)
    assert float(slopes[1]) == pytest.approx(0.5 * factor, abs=0.5 * FIGURE_DIGITS)


@pytest.mark.parametrize(
    ("num_heads", "base"),
    [
        (1, [2.0**-8]),
        (2, [2.0**-4, 2.0**-8]),
        (3, [2.0**-4, 2.0**-8, 2.0**-2]),
        (4, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]),
        (6, [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]),
        (16, [2.0 ** (-head / 2) for head in range(1, 17)]),
        (32, [2.0 ** (-head / 4) for head in range(1, 33)]),
    ],
)
def test_heads_of_the_first_layer_are_pinned(num_heads: int, base: list[float]) -> None:
    slopes = decay_slopes(num_heads, 0, 20, "zero_based")
    assert slopes.dtype == torch.float32
    expected = torch.tensor(base, dtype=torch.float64) * 1.00001
    torch.testing.assert_close(slopes.double(), expected, rtol=ROUNDING_FP32, atol=0)


def test_memory_horizons_match_the_specification() -> None:
    layers = [(16, 0, 20, 256), (16, 18, 20, 4863), (32, 30, 32, 7934)]
    for num_heads, layer_index, num_layers, tokens in layers:
        slowest = decay_slopes(num_heads, layer_index, num_layers, "zero_based").min()
        assert round(1 / float(slowest)) == tokens


def test_float32_slopes_are_rounded_once() -> None:
    exact = decay_slopes(24, 7, 20, "shifted", dtype=torch.float64)
    assert torch.equal(decay_slopes(24, 7, 20, "shifted"), exact.float())
    assert bool((exact > 0).all())
    factor = 1 - (7 - 1) / 19 + 1e-5
    assert float(exact[0]) == pytest.approx(2.0**-0.5 * factor, rel=1e-15)


@pytest.mark.parametrize("rule", ["", "ZERO_BASED", "max_zero"])
def test_unknown_rule_is_refused(rule: str) -> None:
    with pytest.raises(ValueError, match="zero_based"):
        decay_slopes(4, 0, 4, rule)


@pytest.mark.parametrize(("num_heads", "layer_index"), [(0, 0), (4, 4), (4, -1)])
def test_layer_that_does_not_exist_is_refused(num_heads: int, layer_index: int) -> None:
    with pytest.raises(ValueError, match="layer_index"):
        decay_slopes(num_heads, layer_index, 4, "zero_based")
