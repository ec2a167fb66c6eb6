"""Adapters of a plan: how many parameters, and what is refused."""

import pytest

from ring_train.plan import PlanError, make_plan
from ring_train.plan.lora import TARGETS
from tests.unit.plan.configs import tiny

FROZEN = ["init_from=unread", "model.moe_router_bias_update_rate=0"]
H, F, QKV, GQKV, EXPERTS = 64, 64, 3 * 64, 64 + 2 * 32, 8
"""Of the tiny model: width = heads, expert width, lightning and GQA qkv rows, experts."""


def num_parameters(*words: str) -> int:
    plan = make_plan(tiny(*FROZEN, *words), 1)
    assert plan.lora is not None
    return plan.lora.num_parameters


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        # Two lightning layers, two GQA layers and the MTP layer.
        ("linear_qkv", 2 * (H + QKV) + 3 * (H + GQKV)),
        ("linear_proj", 5 * (H + H)),
        ("linear_gate", 2 * (H + H)),
        ("mlp.linear_fc1", H + 2 * 128),
        ("mlp.linear_fc2", 128 + H),
        ("experts.linear_fc1", 4 * EXPERTS * (H + 2 * F)),
        ("experts.linear_fc2", 4 * EXPERTS * (F + H)),
        ("shared_experts.linear_fc1", 4 * (H + 2 * F)),
        ("shared_experts.linear_fc2", 4 * (F + H)),
    ],
)
def test_parameters_of_a_target_are_its_rows_and_columns_times_the_rank(
    targets: str, expected: int
) -> None:
    words = [f"lora.targets=[{targets}]", "lora.rank=3"]
    assert num_parameters(*words) == 3 * expected


def test_parameters_of_all_targets_add_up() -> None:
    parts = [num_parameters("lora.rank=2", f"lora.targets=[{name}]") for name in TARGETS]
    assert num_parameters("lora=all", "lora.rank=2") == sum(parts)


def test_a_run_without_adapters_has_none() -> None:
    plan = make_plan(tiny(), 1)
    assert plan.lora is None
    weights = plan.cost.num_parameters + plan.cost.num_mtp_parameters
    assert plan.state_bytes == (4 * weights, 12 * weights)


def test_frozen_weights_need_neither_gradients_nor_moments() -> None:
    plan = make_plan(tiny(*FROZEN, "lora=all", "train.precision=bf16"), 1)
    assert plan.lora is not None
    assert plan.lora.scale == 2.0
    adapters = plan.lora.num_parameters
    weights = plan.cost.num_parameters + plan.cost.num_mtp_parameters
    assert plan.state_bytes == (2 * (weights + adapters), 16 * adapters)


REFUSED = {
    "rank": (["lora=all", "lora.rank=0"], "lora.rank=0 is not positive"),
    "alpha": (["lora=all", "lora.alpha=inf"], "lora.alpha=inf is not positive and finite"),
    "nearest": (["lora.rank=1", "lora.targets=[linear_vqk]"], "did you mean linear_qkv?"),
    "half a name": (["lora.rank=1", "lora.targets=[linear_fc1]"], "linear_fc1 is not a projection"),
    "none": (["lora.rank=1"], r"lora.targets=\[\] leaves nothing to train"),
    "twice": (["lora.rank=1", "lora.targets=[linear_qkv,linear_qkv]"], "is given 2 times"),
    "no rank": (["lora.targets=[linear_qkv]"], "without lora.rank, which is null"),
    "in no layer": (
        ["lora=all", "model.layer_group_size=1"],
        r"linear_gate is in no layer of this model \(dense, gqa, moe\)",
    ),
    "random weights": (["lora=all", "init_from=null"], "init_from=null draws at random"),
    "bias": (["lora=all", "model.moe_router_bias_update_rate=1e-3"], "model.moe_router_bias"),
    "bias of a phase": (
        [
            *("lora=all", "data.domains.a.path=a", "data.tokenizer=t"),
            *("phases.one.num_steps=4", "phases.one.moe_router_bias_update_rate=0.1"),
            *("phases.two.num_steps=4", "train.num_steps=8"),
        ],
        "phases.one.moe_router_bias_update_rate=0.1 moves expert biases",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused(case: str) -> None:
    words, message = REFUSED[case]
    with pytest.raises(PlanError, match=message):
        make_plan(tiny(*FROZEN, *words), 1)


def test_all_problems_come_at_once() -> None:
    words = ["lora.rank=0", "lora.targets=[linear_vqk]", "model.token_mixers=[gqa]"]
    with pytest.raises(PlanError) as caught:
        make_plan(tiny(*words), 1)
    text = str(caught.value)
    for part in ("lora.rank=0", "linear_vqk", "token_mixers names 1 layers", "init_from", "bias"):
        assert part in text


def test_phases_that_all_freeze_the_biases_are_enough() -> None:
    words = ["lora=all", "data.domains.a.path=a", "data.tokenizer=t", "train.num_steps=40"]
    words += ["model.moe_router_bias_update_rate=0.1"]
    words += ["phases.one.num_steps=40", "phases.one.moe_router_bias_update_rate=0"]
    assert make_plan(tiny(*FROZEN, *words), 1).lora is not None
