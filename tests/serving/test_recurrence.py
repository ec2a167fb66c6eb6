"""The recurrence in torch against its definition, and the slopes against those of vLLM."""

from types import SimpleNamespace

import pytest
import torch
from ring_linear_vllm.attention import CHUNK_TOKENS, lightning_attention
from ring_linear_vllm.config import decay_slopes, is_lightning_layer
from torch import Tensor
from vllm.model_executor.layers.mamba.linear.minimax_linear_attn import MiniMaxText01LinearAttention

FP32 = 2e-6
"""Relative to the largest value: sums of at most 200 products in fp32."""


def one_by_one(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> list[Tensor]:
    """Return (outputs, last state) by the definition, in double."""
    q, k, v, slopes, state = (x.double() for x in (q, k, v, slopes, state))
    outputs = []
    for t in range(q.shape[-2]):
        state = torch.exp(-slopes) * state + k[..., t, :, None] * v[..., t, None, :]
        outputs.append((q[..., t, None, :] @ state).squeeze(-2))
    return [torch.stack(outputs, dim=-2), state]


@pytest.mark.parametrize("num_tokens", [1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 3 * CHUNK_TOKENS + 5])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_chunks_equal_the_definition(num_tokens: int, batch: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, *batch, 3, num_tokens, 8)
    state = torch.randn(*batch, 3, 8, 8)
    slopes = torch.tensor([1.4, 0.5, 1e-3])[:, None, None]
    before = state.clone()
    for got, wanted in zip(
        lightning_attention(q, k, v, slopes, state),
        one_by_one(q, k, v, slopes, state),
        strict=True,
    ):
        assert (got - wanted).abs().max() < FP32 * wanted.abs().max()
    assert torch.equal(state, before)


@pytest.mark.parametrize("num_heads", [1, 4, 6, 16, 32])
def test_zero_based_slopes_are_those_of_vllm(num_heads: int) -> None:
    config = SimpleNamespace(
        num_attention_heads=num_heads, num_hidden_layers=20, decay_layer_rule="zero_based"
    )
    heads = MiniMaxText01LinearAttention._build_slope_tensor(num_heads).flatten()
    for layer in (0, 1, 18):
        wanted = heads * (1 - layer / 19 + 1e-5)
        torch.testing.assert_close(torch.tensor(decay_slopes(config, layer)), wanted)


def test_the_shifted_rule_is_the_other_one_a_layer_before() -> None:
    heads, layers = 4, 8
    zero_based, shifted = (
        SimpleNamespace(num_attention_heads=heads, num_hidden_layers=layers, decay_layer_rule=rule)
        for rule in ("zero_based", "shifted")
    )
    for layer in range(1, layers):
        assert decay_slopes(shifted, layer) == decay_slopes(zero_based, layer - 1)
    assert decay_slopes(shifted, 0)[0] == pytest.approx(0.25 * (1 + 1 / 7 + 1e-5))


def test_the_last_layer_of_each_group_is_softmax() -> None:
    config = SimpleNamespace(layer_group_size=3)
    assert [is_lightning_layer(config, i) for i in range(6)] == [True, True, False] * 2
