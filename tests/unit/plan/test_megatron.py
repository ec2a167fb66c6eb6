"""megatron's config objects hold exactly what the plan says, and each field has one owner."""

import dataclasses
import typing
from typing import Any

import pytest

from ring_train.config import Config, KernelsConfig, ModelConfig, ParallelConfig
from ring_train.plan import make_plan
from ring_train.plan.fields import (
    DERIVED_FIELDS,
    RUNTIME_FIELDS,
    owners,
    same_named_fields,
    snapshot,
)
from ring_train.plan.megatron import (
    derived_fields,
    make_ddp_config,
    make_optimizer_config,
    make_transformer_config,
)
from tests.unit.plan.configs import tiny
from tools.snapshot_megatron_defaults import snapshot as installed_snapshot

LAYOUTS = (["parallel=single"], ["parallel=tp2"], ["parallel=pp2"], ["parallel=ep2"])


def test_the_snapshot_is_that_of_the_installed_megatron() -> None:
    assert snapshot() == installed_snapshot()


def test_every_field_has_one_owner() -> None:
    fields = snapshot()["fields"].keys()
    assert fields >= DERIVED_FIELDS | RUNTIME_FIELDS
    assert not DERIVED_FIELDS & RUNTIME_FIELDS
    nodes = (ModelConfig, ParallelConfig, KernelsConfig)
    names = [field.name for node in nodes for field in dataclasses.fields(node)]
    ours = set(names)
    assert len(ours) == len(names)
    assert not ours & RUNTIME_FIELDS
    assert owners().keys() == ours & fields | DERIVED_FIELDS | RUNTIME_FIELDS


def test_no_other_node_spells_a_megatron_field() -> None:
    for name, node in typing.get_type_hints(Config).items():
        if name not in ("model", "parallel", "kernels") and dataclasses.is_dataclass(node):
            names = {field.name for field in dataclasses.fields(node)}
            assert not names & snapshot()["fields"].keys()


def test_derived_fields_are_those_declared() -> None:
    assert derived_fields(make_plan(tiny(), 1)).keys() == DERIVED_FIELDS


@pytest.mark.parametrize("words", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_megatron_keeps_every_value_it_is_given(words: list[str], precision: str) -> None:
    config = tiny(*words, f"train.precision={precision}")
    plan = make_plan(config, 2)
    nodes = (config.model, config.parallel, config.kernels)
    given = {name: value for node in nodes for name, value in same_named_fields(node).items()}
    given |= derived_fields(plan)
    built = make_transformer_config(plan)
    kept = {name: getattr(built, name) for name in given}
    layout = "pipeline_model_parallel_layout"
    assert str(kept.pop(layout)) == str(given.pop(layout)), "megatron compares it by identity"
    assert kept == given


def test_passed_through_fields_arrive() -> None:
    uncertified = "parallel.allow_uncertified=true"
    plan = make_plan(tiny("model.megatron.distribute_saved_activations=false", uncertified), 1)
    assert make_transformer_config(plan).distribute_saved_activations is False
    plan = make_plan(tiny("model.megatron.barrier_with_L1_time=false", uncertified), 1)
    assert make_transformer_config(plan).barrier_with_L1_time is False


def test_megatron_counts_layers_as_the_plan_does() -> None:
    words = ["parallel=pp2", "parallel.virtual_pipeline_model_parallel_size=2"]
    words += ["model.num_layers=6", "parallel.pipeline_layers=[1,3,2,0]"]
    config = make_transformer_config(make_plan(tiny(*words), 2))
    layout: Any = config.pipeline_model_parallel_layout
    assert [[len(chunk) for chunk in rank] for rank in layout.layout] == [[2, 2], [3, 1]]
    assert layout.flatten_layout[0].name == "embedding"
    assert layout.flatten_layout[-1].name == "loss"
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (True, False)


def test_a_model_without_experts_builds() -> None:
    plan = make_plan(tiny("model.num_moe_experts=null", "model.mtp_num_layers=0"), 1)
    assert make_transformer_config(plan).num_moe_experts is None


def test_optimizer_and_ddp_follow_the_plan() -> None:
    plan = make_plan(tiny("parallel=dp_sharded", "train.precision=bf16"), 2)
    optimizer, ddp = make_optimizer_config(plan), make_ddp_config(plan)
    assert optimizer.use_distributed_optimizer
    assert ddp.use_distributed_optimizer
    assert optimizer.bf16
    assert optimizer.decoupled_weight_decay
    assert (optimizer.lr, optimizer.adam_beta2, optimizer.clip_grad) == (3e-3, 0.95, 1.0)
    assert (ddp.overlap_grad_reduce, ddp.overlap_param_gather) == (False, False)
    assert ddp.grad_reduce_in_fp32
    assert not ddp.average_in_collective


def test_overlap_reaches_optimizer_and_ddp() -> None:
    words = ["overlap_grad_reduce=true", "overlap_param_gather=true"]
    plan = make_plan(tiny("parallel=dp_sharded", *[f"parallel.{word}" for word in words]), 2)
    optimizer, ddp = make_optimizer_config(plan), make_ddp_config(plan)
    assert (ddp.overlap_grad_reduce, ddp.overlap_param_gather) == (True, True)
    assert optimizer.overlap_param_gather
