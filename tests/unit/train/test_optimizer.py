"""What the optimizer decays, and the rates that each of its groups gets."""

from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import DISTRIBUTED_OPTIMIZER, short_plan, weights_by_name

if TYPE_CHECKING:
    import torch

LR, WEIGHT_DECAY = 0.5, 0.1
BF16 = ["train.precision=bf16"]


def step_without_gradients(
    overrides: list[str],
) -> tuple[dict[str, "torch.Tensor"], dict[str, "torch.Tensor"], list[dict[str, Any]]]:
    """Return weights before and after a step of pure weight decay, and the optimizer's groups."""
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer, set_learning_rate

    plan = short_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        before = weights_by_name(model)
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        set_learning_rate(optimizer, LR, WEIGHT_DECAY)
        optimizer.step()
        described = [
            {
                "lr": group["lr"],
                "weight_decay": group["weight_decay"],
                "numbers": sum(parameter.numel() for parameter in group["params"]),
            }
            for group in optimizer.param_groups
        ]
        return before, weights_by_name(model), described


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [(1, []), (1, BF16), (2, DISTRIBUTED_OPTIMIZER)],
    ids=["fp32", "bf16", "distributed"],
)
def test_matrices_decay_and_vectors_do_not(
    ranks: int, overrides: list[str], on_ranks: OnRanks
) -> None:
    import torch

    results = on_ranks(ranks, step_without_gradients, overrides)
    before = results[0][0]
    parameters = {name: w for name, w in before.items() if not name.endswith("expert_bias")}
    for _, after, _ in results:
        for name, weight in parameters.items():
            kept = 1.0 if weight.dim() == 1 else 1 - LR * WEIGHT_DECAY
            torch.testing.assert_close(after[name], kept * weight, msg=name)
    groups = [group for _, _, groups in results for group in groups]
    assert {group["lr"] for group in groups} == {LR}
    for decay, dims in ((0.0, {1}), (WEIGHT_DECAY, {2})):
        numbers = sum(group["numbers"] for group in groups if group["weight_decay"] == decay)
        assert numbers == sum(w.numel() for w in parameters.values() if w.dim() in dims)
