"""The real modules of Transformer Engine under the names, shapes and cuts of the local path."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import ring_train.platform  # noqa: F401  (before the first import of megatron-core)
from tests.conftest import OnRanks
from tests.parallel.short_runs import EP2, TP2, gradients_by_name, relative_errors, short_plan
from tests.parallel.test_checkpoint_layouts import (
    BF16_LOSS_TOLERANCE,
    SAVED_STEP,
    digests,
    resume,
    train_and_save,
)
from tests.parallel.test_generation import PREFILL_TOKENS, SLOTS, generate
from tests.parallel.test_gradients import GRADIENT_TOLERANCE, LOSS_TOLERANCE
from tests.te.engine import models_as_on_a_gpu, with_engine

BF16 = ["train.precision=bf16"]
LOCAL = [*BF16, "kernels.experts=sequential"]
ENGINE = [*BF16, "kernels=transformer_engine"]
FP8 = [
    *BF16,
    "kernels=fp8",
    "train.seq_length=128",
    "model.hidden_size=128",
    "model.kv_channels=32",
    "model.ffn_hidden_size=256",
    "model.moe_ffn_hidden_size=128",
    "model.moe_shared_expert_intermediate_size=128",
]
RECOMPUTED = [
    "parallel.recompute_granularity=full",
    "parallel.recompute_method=uniform",
    "parallel.recompute_num_layers=1",
]
SHARDED = ["parallel.use_distributed_optimizer=true"]
LAYOUTS = {
    "one_rank": (1, []),
    "tp2": (2, TP2),
    "ep2": (2, EP2),
    "tp2_ep2": (2, [*TP2, *EP2]),
    "etp2": (2, ["parallel.expert_tensor_parallel_size=2"]),
    "pp2_vpp2": (
        2,
        [
            "parallel.pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size=2",
        ],
    ),
    "cp2": (2, ["parallel.context_parallel_size=2"]),
}
TAGS = ("tensor_model_parallel", "sequence_parallel", "shared_embedding")


def tensors(overrides: list[str]) -> dict[str, Any]:
    """Return {logical name: all that checkpoints, optimizers and reductions look at}."""
    from ring_train.model import build
    from ring_train.model.tensors import local_tensors
    from ring_train.runtime.distributed import start_runtime

    plan = short_plan(overrides)
    with start_runtime(plan) as groups, models_as_on_a_gpu():
        items = list(local_tensors(build.build_model(plan, groups.collection)))
        assert len({item.name for item in items}) == len(items), "a name is given twice"
        return {
            item.name: {
                "full shape": item.full_shape,
                "dtype": item.tensor.dtype,
                "part": (item.shard.dim, item.shard.world, item.shard.rank, item.shard.blocks),
                "is parameter": item.is_parameter,
                "is copy": item.is_copy,
                "tags": [getattr(item.owner, tag, False) for tag in TAGS],
                "allreduce": getattr(item.owner, "allreduce", True),
                "value": item.tensor.detach().float().numpy().tobytes(),
            }
            for item in items
        }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_shapes_cuts_tags_and_initial_values_are_those_of_the_local_path(
    layout: str, on_ranks: OnRanks
) -> None:
    ranks, overrides = LAYOUTS[layout]
    local = on_ranks(ranks, tensors, [*LOCAL, *overrides])
    engine = on_ranks(ranks, tensors, [*ENGINE, *overrides])
    for expected, found in zip(local, engine, strict=True):
        assert found.keys() == expected.keys()
        assert not {name: found[name] for name in found if found[name] != expected[name]}


def modules(overrides: list[str]) -> dict[str, tuple[str, bool]]:
    """Return {name: (class, whether Transformer Engine's)} of all modules with parameters."""
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
    from transformer_engine.pytorch.ops import BasicOperation

    from ring_train.model import build
    from ring_train.runtime.distributed import start_runtime

    plan = short_plan(overrides)
    with start_runtime(plan) as groups, models_as_on_a_gpu():
        (chunk,) = build.build_model(plan, groups.collection)
        return {
            name.removeprefix("module."): (
                type(module).__name__,
                isinstance(module, (TransformerEngineBaseModule, BasicOperation)),
            )
            for name, module in chunk.named_modules()
            if any(True for _ in module.parameters(recurse=False))
        }


EXPECTED_ENDS = {
    "input_layernorm": "RMSNorm",
    "pre_mlp_layernorm": "RMSNorm",
    "self_attention.linear_proj": "TERowParallelLinear",
    "mlp.linear_fc1": "TELayerNormColumnParallelLinear",
    "mlp.linear_fc2": "TERowParallelLinear",
    "mlp.experts.linear_fc1": "TEColumnParallelGroupedLinear",
    "mlp.experts.linear_fc2": "TERowParallelGroupedLinear",
    "mlp.shared_experts.linear_fc1": "TEColumnParallelLinear",
    "mlp.shared_experts.linear_fc2": "TERowParallelLinear",
}
HIGH_PRECISION_ENDS = {
    "router": "ExpertRouter",
    "linear_gate": "ColumnParallelLinear",
    "gate_norm": "GatedGroupNorm",
    "q_layernorm": "HeadNorm",
    "k_layernorm": "HeadNorm",
    "eh_proj": "ColumnParallelLinear",
    "enorm": "RMSNorm",
    "hnorm": "RMSNorm",
    "final_layernorm": "RMSNorm",
    "word_embeddings": "VocabParallelEmbedding",
    "output_layer": "OutputLayer",
}


@pytest.mark.parametrize("overrides", [ENGINE, FP8], ids=["bf16", "fp8"])
def test_each_part_of_a_layer_is_the_module_it_should_be(
    overrides: list[str], on_ranks: OnRanks
) -> None:
    found = on_ranks(1, modules, overrides)[0]
    left = dict(found)
    for ends, is_engine in ((EXPECTED_ENDS, True), (HIGH_PRECISION_ENDS, False)):
        for end, kind in ends.items():
            these = {name for name in left if name == end or name.endswith(f".{end}")}
            assert these, f"no module ends with {end}"
            assert {left.pop(name) for name in these} == {(kind, is_engine)}
    # Two readers of the normalised input, or one: what is left are the qkv projections.
    lightning = {name for name in left if f"{name.removesuffix('qkv')}gate" in found}
    assert {found[name][0] for name in lightning} == {"TEColumnParallelLinear"}
    assert {left[name][0] for name in left.keys() - lightning} == {
        "TELayerNormColumnParallelLinear"
    }
    assert all(name.endswith("self_attention.linear_qkv") for name in left)


@pytest.mark.parametrize("layout", ["one_rank", "tp2", "ep2", "tp2_ep2", "pp2_vpp2", "cp2"])
def test_the_parts_are_put_together_as_in_the_local_path(
    layout: str, fp64: None, on_ranks: OnRanks
) -> None:
    ranks, overrides = LAYOUTS[layout]
    local = on_ranks(ranks, gradients_by_name, [*LOCAL, *overrides])
    engine = on_ranks(ranks, with_engine, gradients_by_name, [*ENGINE, *overrides])
    for expected, found in zip(local, engine, strict=True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=0, abs=LOSS_TOLERANCE)
        assert found["gradients"].keys() == expected["gradients"].keys()
        errors = relative_errors(found["gradients"], expected["gradients"])
        assert not {name: error for name, error in errors.items() if error > GRADIENT_TOLERANCE}


def fp8_by_module(overrides: list[str], *, generates: bool = False) -> dict[str, set[bool]]:
    """Return {module: whether its forward ran with FP8 on}, of a training forward or generation."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from ring_train.generation import Generator, Sampling
    from ring_train.model import build
    from ring_train.runtime.distributed import start_runtime
    from tests.parallel.streams import make_micro_batches

    plan = short_plan(overrides)
    found: dict[str, set[bool]] = {}
    with start_runtime(plan) as groups, models_as_on_a_gpu():
        model = build.build_model(plan, groups.collection)
        for name, module in model[0].module.named_modules():

            def note(*_: Any, name: str = name) -> None:
                found.setdefault(name, set()).add(FP8GlobalStateManager.is_fp8_enabled())

            module.register_forward_pre_hook(note)
        if generates:
            generator = Generator(plan, model, groups, max_batch_size=2, max_prefill_tokens=8)
            generator.generate([[1, 2, 3]], Sampling(max_new_tokens=2, stop_tokens=()))
        else:
            model[0](make_micro_batches(plan, 0, 0)[0]).sum().backward()
    return found


@pytest.mark.parametrize("recompute", [[], RECOMPUTED], ids=["kept", "recomputed"])
def test_fp8_is_on_in_every_layer_and_nowhere_else(recompute: list[str], on_ranks: OnRanks) -> None:
    found = on_ranks(1, with_engine, fp8_by_module, [*FP8, *recompute])[0]
    inside = {name for name in found if ".layers." in name and ".transformer_layer" in name}
    inside |= {name for name in found if name.startswith("decoder.layers.")}
    assert {name for name, states in found.items() if states == {True}} == inside
    outside = {"embedding", "output_layer", "decoder.final_layernorm", "mtp.layers.0.eh_proj"}
    assert outside <= {name for name, states in found.items() if states == {False}}


def test_fp8_is_off_in_generation(on_ranks: OnRanks) -> None:
    generation = partial(fp8_by_module, FP8, generates=True)
    found = on_ranks(1, with_engine, generation)[0]
    assert {name.split(".")[0] for name in found if name} == {"embedding", "decoder"}
    assert all(states == {False} for states in found.values())


def test_what_is_generated_is_that_of_the_local_path(fp64: None, on_ranks: OnRanks) -> None:
    arguments = SLOTS, PREFILL_TOKENS
    (expected,) = on_ranks(1, generate, LOCAL, *arguments)
    (found,) = on_ranks(1, with_engine, generate, ENGINE, *arguments)
    for answers, others in zip(expected, found, strict=True):
        assert [answer.tokens for answer in answers] == [other.tokens for other in others]


@pytest.mark.parametrize(
    ("first", "second"),
    [("one_rank", "tp2_ep2"), ("ep2", "one_rank"), ("tp2", "tp2")],
)
@pytest.mark.parametrize("sharded", [[], SHARDED], ids=["plain", "sharded"])
@pytest.mark.parametrize("engine_first", [False, True], ids=["local_saves", "engine_saves"])
def test_what_one_path_saves_the_other_continues(
    first: str,
    second: str,
    sharded: list[str],
    engine_first: bool,
    on_ranks: OnRanks,
    tmp_path: Path,
) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (ranks, layout), paths = LAYOUTS[first], [LOCAL, ENGINE]
    if engine_first:
        paths.reverse()
    expected = on_ranks(ranks, with_engine, train_and_save, saved, [*paths[0], *sharded, *layout])
    shutil.copytree(saved / "checkpoints", tmp_path / "resumed" / "checkpoints")
    ranks, layout = LAYOUTS[second]
    found = on_ranks(
        ranks, with_engine, resume, tmp_path / "resumed", [*paths[1], *sharded, *layout]
    )
    before = digests(saved, SAVED_STEP)
    kinds = {key.split("/")[0] for key in before}
    assert kinds == {"weight", "master", "exp_avg", "exp_avg_sq", "rng"}
    assert not [key for key in before if "_extra_state" in key or "layer_norm_weight" in key]
    assert digests(tmp_path / "resumed", SAVED_STEP + 1) == before
    assert [part.loss for part in found] == pytest.approx(
        [expected[0].loss] * len(found), rel=BF16_LOSS_TOLERANCE, abs=0
    )
