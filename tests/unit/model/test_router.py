"""The router as a module: what it counts, keeps in fp32 through casts, and adds to the loss."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import nn

from ring_train.config import compose
from ring_train.plan import make_plan
from ring_train.plan.megatron import make_transformer_config

# isort: split
from ring_train.model.router import ExpertRouter, begin_router_step, routers

FINE_BIAS = 1 + 2.0**-20
"""A number that bf16 and fp16 round to 1."""


@pytest.fixture(autouse=True)
def loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron keeps the scale of auxiliary losses in a class; ranks are forks of this process."""
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.ones(1))


@pytest.fixture
def router() -> ExpertRouter:
    """Return a router of 8 experts with a bias that only fp32 can hold."""
    plan = make_plan(compose("pretrain", ["model=tiny", "train=cpu", "optim=short"]), 1)
    groups: Any = SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)
    router = ExpertRouter(make_transformer_config(plan), groups, plan.config.model)
    router.set_layer_number(1)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    router.expert_bias.fill_(FINE_BIAS)
    return router


def hidden(tokens: int) -> torch.Tensor:
    return torch.randn(tokens, 1, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "cast",
    [nn.Module.bfloat16, nn.Module.half, lambda module: module.to(torch.bfloat16)],
    ids=["bfloat16", "half", "to"],
)
def test_the_bias_survives_a_cast_of_the_model(cast: Any, router: ExpertRouter) -> None:
    model = cast(nn.Sequential(router))
    assert router.weight.dtype != torch.float32
    assert router.expert_bias.dtype == torch.float32
    assert router.expert_bias.tolist() == [FINE_BIAS] * 8
    assert model.state_dict()["0.expert_bias"].equal(router.expert_bias)
    assert dict(model.named_buffers())["0.expert_bias"] is router.expert_bias


def test_the_bias_is_saved_and_the_counters_are_not(router: ExpertRouter) -> None:
    assert router.state_dict().keys() == {"weight", "expert_bias"}
    router.load_state_dict({**router.state_dict(), "expert_bias": torch.arange(8.0)})
    assert router.expert_bias.tolist() == list(range(8))


def test_the_bias_moves_the_choice_and_not_the_weights(router: ExpertRouter) -> None:
    router.expert_bias.zero_()
    free, _ = router(hidden(50))
    router.expert_bias[3] = 10.0
    probs, chosen = router(hidden(50))
    assert chosen[:, 3].all()
    assert probs.sum(-1).allclose(free.sum(-1))
    scores = router.gating(hidden(50)).flatten(0, -2).sigmoid()
    picked = torch.where(chosen, scores, 0)
    scale = router.model.moe_router_topk_scaling_factor
    torch.testing.assert_close(probs, scale * picked / picked.sum(-1, keepdim=True))


def test_counts_add_up_over_calls_and_leave_out_padding(router: ExpertRouter) -> None:
    begin_router_step([router], 30)
    first = router(hidden(20))[1]
    padding = torch.arange(20)[:, None] >= 10
    second = router(hidden(20), padding)[1]
    expected = first.sum(0) + second[:10].sum(0)
    assert router.tokens_per_expert.tolist() == expected.tolist()
    assert router.tokens_per_expert.dtype == torch.int64
    assert router.tokens_per_expert.sum() == 30 * router.model.moe_router_topk
    begin_router_step([router], 30)
    assert not router.tokens_per_expert.any()


def test_without_gradients_nothing_is_counted(router: ExpertRouter) -> None:
    begin_router_step([router], 20)
    with torch.no_grad():
        router(hidden(20))
    assert not router.tokens_per_expert.any()
    assert not router.z_loss


@pytest.fixture
def softmax_router() -> ExpertRouter:
    """Return a softmax router of 8 experts, 3 per token, with a balance loss."""
    words = ["model=tiny_v1", "train=cpu", "optim=short", "model.moe_aux_loss_coeff=0.5"]
    plan = make_plan(compose("pretrain", words), 1)
    groups: Any = SimpleNamespace(tp=None, cp=None, tp_cp=None, tp_dp_cp=None)
    router = ExpertRouter(make_transformer_config(plan), groups, plan.config.model)
    nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    router.weight.data = router.weight.double()
    return router


def balance_loss(router: ExpertRouter, x: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    """Return 0.5 * sum_i load_i P_i by hand."""
    return 0.5 * (load * (x.squeeze(1) @ router.weight.mT).softmax(-1).mean(0)).sum()


def test_the_gradient_of_the_balance_loss_is_its_finite_difference(
    softmax_router: ExpertRouter,
) -> None:
    router, x = softmax_router, hidden(20).double()
    load = torch.linspace(0.0, 2.0, 8)
    router.expert_load.copy_(load)
    router.model.moe_z_loss_coeff = 0.0
    begin_router_step([router], 20)
    probs, _ = router(x)
    (grad,) = torch.autograd.grad(probs.sum() * 0, router.weight)
    step = 1e-6 * torch.randn(8, 64, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        router.weight.add_(step)
        above = balance_loss(router, x, load)
        router.weight.sub_(2 * step)
        below = balance_loss(router, x, load)
    assert float((grad * step).sum()) == pytest.approx(float(above - below) / 2, rel=1e-5)


def test_a_balanced_load_pushes_nowhere(softmax_router: ExpertRouter) -> None:
    router = softmax_router
    assert router.expert_load.tolist() == [1.0] * 8
    router.model.moe_z_loss_coeff = 0.0
    begin_router_step([router], 20)
    probs, _ = router(hidden(20).double())
    (grad,) = torch.autograd.grad(probs.sum() * 0, router.weight)
    assert float(grad.abs().max()) < 1e-12


def test_a_softmax_router_saves_no_bias(softmax_router: ExpertRouter) -> None:
    assert softmax_router.state_dict().keys() == {"weight"}
    assert softmax_router.expert_bias is None
    assert nn.Sequential(softmax_router).bfloat16()[0].expert_load.dtype == torch.float32


def test_the_margin_is_that_of_the_closest_token(router: ExpertRouter) -> None:
    router.track_margin = True
    alone = float("inf")
    for row in hidden(40).split(1):
        router.margin = float("inf")
        router(row)
        alone = min(alone, router.margin)
    router.margin = float("inf")
    router(hidden(40))
    assert router.margin == pytest.approx(alone, abs=1e-6)
    assert list(routers([nn.Sequential(router)])) == [router]
