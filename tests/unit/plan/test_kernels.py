"""Kernels that contradict the run are refused by the plan, with the way out."""

import pytest

from ring_train.config import compose
from ring_train.plan import PlanError, make_plan
from ring_train.plan.kernels import groups_experts
from tests.unit.plan.configs import tiny

FP8 = [
    "model=tiny",
    "kernels=fp8",
    "train.precision=bf16",
    "train.seq_length=256",
    "train.micro_batch_size=1",
    "model.hidden_size=256",
    "model.kv_channels=64",
    "model.ffn_hidden_size=512",
    "model.moe_ffn_hidden_size=256",
    "model.moe_shared_expert_intermediate_size=256",
]


def plan(*overrides: str, world_size: int = 1) -> None:
    make_plan(compose("pretrain", [*FP8, *overrides]), world_size)


def test_fp8_takes_whole_blocks() -> None:
    plan()
    plan("parallel.tensor_model_parallel_size=2", world_size=2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden_size=192", "model.hidden_size is 192"),
        ("model.kv_channels=16", r"model.num_attention_heads \* model.kv_channels over tp is 64"),
        ("model.ffn_hidden_size=320", "model.ffn_hidden_size over tp is 320"),
        ("model.moe_ffn_hidden_size=64", "model.moe_ffn_hidden_size over etp is 64"),
        (
            "model.moe_shared_expert_intermediate_size=64",
            "model.moe_shared_expert_intermediate_size over tp is 64",
        ),
        ("train.seq_length=160", r"train.seq_length tokens is 160"),
        ("parallel.context_parallel_size=4", r"train.seq_length tokens is 64"),
        ("parallel.expert_tensor_parallel_size=4", "moe_ffn_hidden_size over etp is 64"),
        ("kernels.transformer_impl=local", "needs kernels.transformer_impl=transformer_engine"),
        ("train.precision=fp32", "choose train.precision=bf16"),
        ("kernels.experts=sequential", "leave it at auto"),
        ("lora=attention", "choose kernels.transformer_impl=local"),
    ],
)
def test_fp8_is_refused_where_it_cannot_be(override: str, message: str) -> None:
    world_size = 4 if "parallel" in override else 1
    with pytest.raises(PlanError, match=message):
        plan(override, world_size=world_size)


UNUSUAL = ["model.megatron.glu_linear_offset=1.0", "parallel.allow_uncertified=true"]
ADAPTERS = ("init_from=unused", "model.moe_router_bias_update_rate=0")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], True),
        (["kernels.experts=sequential"], False),
        (["lora=attention", *ADAPTERS], True),
        (["lora=all", *ADAPTERS], False),
        (["model.megatron.activation_func_clamp_value=7.0"], False),
        (["model.megatron.activation_func_clamp_value=0.0"], False),
        (["model.megatron.moe_latent_size=32"], False),
        (["model.megatron.moe_expert_capacity_factor=1.5"], False),
        (["model.megatron.glu_linear_offset=0.0"], True),
    ],
    ids=str,
)
def test_experts_are_grouped_where_they_can_be(words: list[str], expected: bool) -> None:
    assert groups_experts(tiny(*words)) is expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora=all", *ADAPTERS], "lora.targets names routed experts; choose"),
        (UNUSUAL, "does not compute .*glu_linear_offset=1.0; remove"),
    ],
)
def test_grouped_experts_are_refused_where_they_cannot_be(words: list[str], message: str) -> None:
    make_plan(tiny(*words), 1)
    with pytest.raises(PlanError, match=message):
        make_plan(tiny(*words, "kernels.experts=grouped"), 1)
