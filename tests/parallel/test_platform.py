"""megatron-core itself works on gloo through ring_train.platform: sharded equals unsharded."""

from types import SimpleNamespace

import torch

from tests.conftest import OnRanks


def make_plan(world_size: int, **degrees: int) -> SimpleNamespace:
    """Return the part of a Plan that start_runtime reads."""
    mesh = dict(world_size=world_size, tp=1, pp=1, vpp=1, ep=1, etp=1, cp=1) | degrees
    return SimpleNamespace(mesh=SimpleNamespace(**mesh), config=SimpleNamespace(seed=1234))


def assert_column_parallel_equals_dense() -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from ring_train.runtime import start_runtime

    with start_runtime(make_plan(2, tp=2)) as groups:
        config = TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=2
        )
        layer = ColumnParallelLinear(
            8, 12, config=config, init_method=torch.nn.init.zeros_, bias=False, gather_output=True,
            tp_group=groups.collection.tp,
        )
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(12, 8, generator=generator, requires_grad=True)
        x = torch.randn(5, 1, 8, generator=generator, requires_grad=True)
        rows = slice(6 * groups.tp_rank, 6 * groups.tp_rank + 6)
        layer.weight.data.copy_(weight.data[rows])
        y, _ = layer(x)
        y.square().sum().backward()
        grad, x.grad = x.grad, None
        (x @ weight.T).square().sum().backward()
        torch.testing.assert_close(y, x @ weight.T)
        torch.testing.assert_close(layer.weight.grad, weight.grad[rows])
        torch.testing.assert_close(grad, x.grad)


def test_column_parallel_equals_dense(on_ranks: OnRanks) -> None:
    on_ranks(2, assert_column_parallel_equals_dense)
