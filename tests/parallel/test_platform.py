"""megatron-core itself works on gloo through ring_train.platform: sharded equals unsharded.

Imports of megatron sit in the functions that ranks run, so that collecting this file is cheap.
"""

from types import SimpleNamespace
from typing import Any

import torch

from tests.conftest import OnRanks

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # fp32, sums of at most 64 terms in another order


def make_plan(world_size: int, **degrees: int) -> Any:
    """Return the part of a Plan that start_runtime reads."""
    mesh = {"world_size": world_size, "tp": 1, "pp": 1, "vpp": 1, "ep": 1, "etp": 1, "cp": 1}
    return SimpleNamespace(
        mesh=SimpleNamespace(**(mesh | degrees)), config=SimpleNamespace(seed=1234)
    )


def random_tensor(*shape: int, seed: int) -> torch.Tensor:
    """Return the same normal numbers on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_column_parallel_equals_dense() -> None:
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from ring_train.runtime.distributed import start_runtime

    with start_runtime(make_plan(2, tp=2)) as groups:
        config = TransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=2
        )
        layer: Any = ColumnParallelLinear(
            8,
            12,
            config=config,
            init_method=torch.nn.init.zeros_,
            bias=False,
            gather_output=True,
            tp_group=groups.collection.tp,
        )
        weight: Any = random_tensor(12, 8, seed=1).requires_grad_()
        x = random_tensor(5, 1, 8, seed=2).requires_grad_()
        rows = slice(6 * groups.tp_rank, 6 * groups.tp_rank + 6)
        layer.weight.data.copy_(weight.data[rows])
        y, _ = layer(x)
        y.square().sum().backward()
        grad, x.grad = x.grad, None
        dense = x @ weight.T
        dense.square().sum().backward()
        torch.testing.assert_close(y, dense, **TOLERANCE)
        torch.testing.assert_close(layer.weight.grad, weight.grad[rows], **TOLERANCE)
        torch.testing.assert_close(grad, x.grad, **TOLERANCE)


def test_column_parallel_equals_dense(on_ranks: OnRanks) -> None:
    on_ranks(2, assert_column_parallel_equals_dense)


def build_sharded_linear(groups: Any) -> tuple[Any, Any, torch.nn.Parameter]:
    """Return a model of one 32 x 32 matrix, its distributed optimizer and a copy of the matrix."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    class Linear(MegatronModule):
        def __init__(self, config: TransformerConfig) -> None:
            super().__init__(config)
            self.weight = torch.nn.Parameter(random_tensor(32, 32, seed=1) / 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.weight).square().mean()

    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2)
    model: Any = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(use_distributed_optimizer=True),
        Linear(config),
        pg_collection=groups.collection,
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=0.01,
            weight_decay=0.1,
            adam_beta1=0.9,
            adam_beta2=0.95,
            clip_grad=0.0,
            use_distributed_optimizer=True,
        ),
        [model],
        use_gloo_process_groups=False,
        pg_collection=groups.collection,
    )
    return model, optimizer, torch.nn.Parameter(model.module.weight.detach().clone())


def take_step(model: Any, optimizer: Any, x: torch.Tensor) -> None:
    model.zero_grad_buffer()
    model(x).backward()
    model.finish_grad_sync()
    updated, _, _ = optimizer.step()
    assert updated


def resume_in_place(optimizer: Any) -> None:
    """Save and load what a checkpoint holds of the optimizer, apart from the sharded moments."""
    moments = {p: dict(state) for p, state in optimizer.optimizer.state.items()}
    saved = optimizer.state_dict()
    optimizer.optimizer.state.clear()
    for group in optimizer.optimizer.param_groups:
        group.pop("step", None)
    optimizer.load_state_dict(saved)
    for parameter, state in moments.items():
        optimizer.optimizer.state[parameter].update(state)


def assert_distributed_optimizer_equals_adamw() -> None:
    from ring_train.runtime.distributed import start_runtime

    with start_runtime(make_plan(2)) as groups:
        model, optimizer, dense = build_sharded_linear(groups)
        adamw = torch.optim.AdamW([dense], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
        for step in range(4):
            x = random_tensor(2, 16, 32, seed=10 + step)
            take_step(model, optimizer, x[groups.dp_rank])
            adamw.zero_grad()
            (x @ dense).square().mean().backward()
            adamw.step()
            if step == 1:
                resume_in_place(optimizer)
        torch.testing.assert_close(model.module.weight, dense, **TOLERANCE)
        states = optimizer.optimizer.state.values()
        assert sum(state["exp_avg"].numel() for state in states) == dense.numel() // 2
        assert {group["step"] for group in optimizer.optimizer.param_groups} == {4}


def test_distributed_optimizer_equals_adamw(on_ranks: OnRanks) -> None:
    on_ranks(2, assert_distributed_optimizer_equals_adamw)


def assert_expert_parallel_equals_dense() -> None:
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from ring_train.runtime.distributed import start_runtime

    num_experts, h, f = 4, 8, 6
    with start_runtime(make_plan(2, ep=2)) as groups:
        config = TransformerConfig(
            num_layers=1,
            hidden_size=h,
            num_attention_heads=2,
            ffn_hidden_size=f,
            add_bias_linear=False,
            activation_func=torch.nn.functional.silu,
            num_moe_experts=num_experts,
            moe_router_topk=2,
            moe_router_load_balancing_type="none",
            moe_router_dtype="fp32",
            moe_token_dispatcher_type="alltoall",
            expert_model_parallel_size=2,
        )
        build: Any = get_moe_module_spec(use_te=False, num_experts=num_experts)
        layer = build(config=config, layer_number=1, pg_collection=groups.collection)
        fc1 = [random_tensor(f, h, seed=10 + e).requires_grad_() for e in range(num_experts)]
        fc2 = [random_tensor(h, f, seed=20 + e).requires_grad_() for e in range(num_experts)]
        layer.router.weight.data.copy_(random_tensor(num_experts, h, seed=1))
        first = 2 * groups.ep_rank
        for j, expert in enumerate(layer.experts.local_experts):
            expert.linear_fc1.weight.data.copy_(fc1[first + j].data)
            expert.linear_fc2.weight.data.copy_(fc2[first + j].data)

        # Each rank has tokens of its own: the dense reference sees those of both.
        x = random_tensor(2, 7, 1, h, seed=2)
        y, _ = layer(x[groups.dp_rank])
        y.square().sum().backward()

        logits, experts = (x @ layer.router.weight.detach().T).topk(2)
        gates = torch.zeros(2, 7, 1, num_experts).scatter(-1, experts, logits.softmax(-1))
        dense = torch.zeros_like(x)
        for e in range(num_experts):
            dense = dense + gates[..., e, None] * (
                torch.nn.functional.silu(x @ fc1[e].T) @ fc2[e].T
            )
        dense.square().sum().backward()
        torch.testing.assert_close(y, dense[groups.dp_rank], **TOLERANCE)
        for j, expert in enumerate(layer.experts.local_experts):
            torch.testing.assert_close(
                expert.linear_fc1.weight.grad, fc1[first + j].grad, rtol=1e-4, atol=1e-5
            )


def test_expert_parallel_equals_dense(on_ranks: OnRanks) -> None:
    on_ranks(2, assert_expert_parallel_equals_dense)


def random_states_of_rank() -> list[list[float]]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from ring_train.runtime.distributed import start_runtime

    with start_runtime(make_plan(2, tp=2)):
        shared = torch.rand(3, device="cuda")
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork():
            own = torch.rand(3)
        after = torch.rand(3)
    return [shared.tolist(), own.tolist(), after.tolist()]


def test_random_states_are_shared_outside_and_own_inside_tensor_parallel_regions(
    on_ranks: OnRanks,
) -> None:
    (shared0, own0, after0), (shared1, own1, after1) = on_ranks(2, random_states_of_rank)
    assert (shared0, after0) == (shared1, after1)
    assert own0 != own1
    assert after0 != shared0
