"""make_plan derives the mesh, layers and batch, and reports every violated relation at once."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_train.config import ParallelConfig
from ring_train.plan import PlanError, make_plan, smallest_world
from ring_train.plan.mesh import make_mesh, mesh_problems
from ring_train.plan.mixers import TOKEN_MIXERS, Mixer
from tests.unit.plan.configs import tiny

TINY = tiny().model
DEGREE = st.sampled_from([1, 2, 3, 4, 8])


def problems(world_size: int, *words: str) -> tuple[str, ...]:
    """Return what make_plan has against a changed tiny run."""
    with pytest.raises(PlanError, match="=") as caught:
        make_plan(tiny(*words), world_size)
    return caught.value.problems


def test_the_tiny_plan_is_what_a_reader_computes() -> None:
    plan = make_plan(tiny("parallel=tp2"), 4)
    mesh = plan.mesh
    assert (mesh.tp, mesh.pp, mesh.vpp, mesh.cp, mesh.dp, mesh.etp, mesh.ep, mesh.edp) == (
        *(2, 1, 1, 1, 2),
        *(1, 1, 4),
    )
    assert mesh.sequence_parallel
    assert plan.layers.token_mixers == ("lightning", "gqa", "lightning", "gqa")
    assert plan.layers.channel_mixers == ("dense", "moe", "moe", "moe")
    assert (plan.pipeline.stages, plan.layers.num_mtp) == (((0, 1, 2, 3),), 1)
    assert plan.total_tokens == 204800
    assert dataclasses.asdict(plan.batch) == {
        "seq_length": 256,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "num_micro_batches": 2,
        "tokens_per_micro_batch": 512,
        "tokens_per_step": 2048,
    }


def test_a_plan_is_frozen_and_does_not_touch_its_config() -> None:
    config = tiny()
    plan = make_plan(config, 1)
    assert config == tiny()
    with pytest.raises(dataclasses.FrozenInstanceError, match="mesh"):
        plan.mesh = plan.mesh  # type: ignore[misc]  (forbidden, which is the point)


@given(tp=DEGREE, pp=DEGREE, ep=DEGREE, times=DEGREE)
def test_degrees_multiply_to_the_world(tp: int, pp: int, ep: int, times: int) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )
    world_size = times * smallest_world(parallel)
    mesh = make_mesh(parallel, world_size)
    assert not mesh_problems(parallel, world_size)
    assert mesh.tp * mesh.cp * mesh.pp * mesh.dp == world_size
    assert mesh.etp * mesh.ep * mesh.pp * mesh.edp == world_size


@pytest.mark.parametrize(
    ("world_size", "words", "message"),
    [
        (
            1,
            ["model.num_layers=5"],
            "model.num_layers=5 is not divisible by model.layer_group_size",
        ),
        (1, ["model.first_k_dense_replace=5"], "model.first_k_dense_replace=5 exceeds"),
        (4, ["parallel.tensor_model_parallel_size=4"], "model.group_norm_size=2 is not divisible"),
        (4, ["parallel.tensor_model_parallel_size=4"], "model.num_query_groups=2 is not divisible"),
        (8, ["parallel.tensor_model_parallel_size=8"], "model.num_attention_heads=4 is not"),
        (2, ["parallel=tp2", "model.vocab_size=511"], "model.vocab_size=511 is not divisible by"),
        (2, ["parallel=tp2", "model.hidden_size=63"], "model.hidden_size=63 is not divisible by"),
        (2, ["parallel=tp2", "model.ffn_hidden_size=9"], "model.ffn_hidden_size=9 is not"),
        (2, ["parallel=tp2", "parallel.sequence_parallel=false"], "MoE layers under tensor"),
        (
            2,
            ["parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"],
            "parallel.overlap_param_gather=True gathers parameters that ranks have updated in "
            "shards, but parallel.use_distributed_optimizer=False; set parallel.use_distributed_",
        ),
        (
            2,
            ["parallel.overlap_param_gather=true", "parallel.use_distributed_optimizer=true"],
            "parallel.overlap_param_gather=True gathers the buckets of the gradient reduction, but "
            "parallel.overlap_grad_reduce=False; set parallel.overlap_grad_reduce=true, or",
        ),
        (1, ["parallel.sequence_parallel=true"], "parallel.sequence_parallel=True shards over"),
        (1, ["model.group_norm_size=3"], "model.num_attention_heads=4 is not divisible by model.g"),
        (
            1,
            ["model.num_query_groups=3"],
            "model.num_attention_heads=4 is not divisible by model.n",
        ),
        (3, ["parallel.expert_model_parallel_size=3"], "model.num_moe_experts=8 is not divisible"),
        (3, ["parallel=ep2"], "world_size=3 is not divisible by expert_tensor_parallel_size *"),
        (3, ["parallel=tp2"], "world_size=3 is not divisible by tensor_model_parallel_size *"),
        (
            3,
            ["parallel.expert_tensor_parallel_size=3"],
            "model.moe_ffn_hidden_size=64 is not divisible by parallel.expert_tensor_parallel_size",
        ),
        (
            2,
            [
                *("parallel.expert_tensor_parallel_size=2", "model.num_moe_experts=null"),
                "model.mtp_num_layers=0",
            ],
            "parallel.expert_tensor_parallel_size=2, but no layer is MoE; use 1",
        ),
        (1, ["model.moe_router_num_groups=3"], "model.num_moe_experts=8 is not divisible by model"),
        (1, ["model.moe_router_group_topk=3"], "model.moe_router_group_topk=3 exceeds model.moe_r"),
        (1, ["model.moe_router_group_topk=2"], "is not 2 * model.moe_router_group_topk=2"),
        (1, ["model.moe_router_topk=5"], "model.moe_router_topk=5 exceeds the 4 experts of"),
        (1, ["model.moe_router_topk=9"], "model.moe_router_topk=9 exceeds model.num_moe_experts=8"),
        (1, ["model.moe_router_group_topk=null"], "give both or neither"),
        (1, ["model.moe_router_score_function=softmax"], "softmax has no expert bias"),
        (1, ["model.num_shared_experts=0"], "model.num_shared_experts=0 contradicts"),
        (1, ["model.num_shared_experts=3"], "model.moe_shared_expert_intermediate_size=64 is not"),
        (1, ["model.num_moe_experts=null"], "model.num_moe_experts=None, but some layers are MoE"),
        (
            2,
            ["parallel=ep2", "model.num_moe_experts=null", "model.mtp_num_layers=0"],
            "parallel.expert_model_parallel_size=2, but no layer is MoE; use 1",
        ),
        (1, ["model.rotary_percent=0.3"], "model.rotary_percent=0.3 of model.kv_channels=16"),
        (1, ["model.rotary_percent=1.5"], "model.rotary_percent=1.5 exceeds 1"),
        (1, ["model.kv_channels=0"], "model.kv_channels=0 is not positive"),
        (1, ["model.hidden_size=-64"], "model.hidden_size=-64 is not positive"),
        (1, ["optim.lr=nan"], "optim.lr=nan is not positive"),
        (1, ["optim.weight_decay=-1"], "optim.weight_decay=-1.0 is negative"),
        (0, [], "world_size=0 is not positive"),
        (1, ["model.eos_token_id=512"], "model.eos_token_id=512 is outside model.vocab_size=512"),
        (1, ["model.architecture=bailing_moe_v2"], "bailing_moe_v2 has no lightning layers"),
        (
            1,
            ["model.token_mixers=[gqa]"],
            "model.token_mixers names 1 layers, not model.num_layers",
        ),
        (
            1,
            ["model.token_mixers=[gqa,gqa,gqa,lightnin]"],
            "model.token_mixers=lightnin is not registered; did you mean lightning?",
        ),
        (
            1,
            ["model.channel_mixers=[moe,moe,moe,mlp]"],
            "model.channel_mixers=mlp is not registered",
        ),
        (4, ["train.global_batch_size=12"], "train.global_batch_size=12 is not divisible by train"),
        (
            2,
            ["parallel=tp2", "train.seq_length=255", "train.micro_batch_size=1"],
            "train.seq_length=255 is not divisible by parallel.tensor_model_parallel_size=2",
        ),
        (1, ["train.seq_length=8192"], "train.seq_length=8192 exceeds model.max_position_embeddin"),
        (1, ["train.eval_steps=0"], "train.eval_steps=0 leaves nothing to evaluate"),
        (1, ["optim.min_lr=1"], "optim.min_lr=1.0 exceeds the peak optim.lr=0.003"),
        (1, ["train.num_steps=29"], "exceed train.num_steps=29"),
        (1, ["optim.lr_decay_style=cosine"], "optim.wsd_decay_steps=20 belongs to the wsd"),
        (1, ["decay_layer_rule=shifted"], "for a new model set model.decay_layer_rule"),
        (
            1,
            ["data.domains={a: {path: x, weight: -1}}"],
            "data.domains.a.weight=-1.0 is not 0 or more",
        ),
        (
            1,
            ["data.domains={a: {path: x, weight: 0}}"],
            "data.domains.*.weight=0: nothing",
        ),
        (
            1,
            ["model.megatron.moe_grouped_gem=true"],
            "model.megatron.moe_grouped_gem=True is not a field of TransformerConfig in "
            "megatron-core 0.19.2; did you mean moe_grouped_gemm?",
        ),
        (
            1,
            ["model.megatron.hidden_size=3"],
            "model.megatron.hidden_size=3: the field belongs to model.hidden_size; remove it here",
        ),
        (1, ["model.megatron.normalization=LayerNorm"], "belongs to the plan, which derives it"),
        (1, ["model.megatron.no_sync_func=x"], "belongs to the training loop"),
    ],
)
def test_a_violated_relation_is_named(world_size: int, words: list[str], message: str) -> None:
    assert any(message in problem for problem in problems(world_size, *words))


def test_all_problems_are_reported_at_once() -> None:
    found = problems(
        *(3, "parallel=tp2", "parallel.pipeline_layers=[1]", "model.vocab_size=511"),
        *("model.num_layers=5", "model.moe_router_topk=3", "train.seq_length=8192"),
        "model.megatron.foo=1",
    )
    assert len(found) == len(set(found)) >= 7
    for part in (
        "world_size=3",
        "pipeline_layers",
        "vocab_size",
        "num_layers",
        "topk",
        "seq_le",
        "foo",
    ):
        assert any(part in problem for problem in found)


def test_every_problem_has_a_value_a_relation_and_a_way_out() -> None:
    found = problems(3, "parallel=tp2", "model.vocab_size=511", "train.seq_length=8192")
    assert all("=" in problem and ";" in problem for problem in found)


def test_mixers_named_per_layer_replace_the_pattern() -> None:
    mixers = ["gqa", "gqa", "lightning", "gqa"]
    plan = make_plan(tiny(f"model.token_mixers={mixers}".replace(" ", "")), 1)
    assert plan.layers.token_mixers == tuple(mixers)


def test_a_new_mixer_is_one_entry_in_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    mean = Mixer(
        num_parameters=lambda model: 7,
        num_active_parameters=lambda model: 5,
        flops_per_token=lambda model, seq_length: 11.0 * seq_length,
        spec="tests.nowhere:mean_spec",
        problems=lambda model, mesh: ["model.token_mixers=mean cannot"] if mesh.tp > 1 else [],
    )
    monkeypatch.setitem(TOKEN_MIXERS, "mean", mean)
    words = ["model.num_moe_experts=null", "model.mtp_num_layers=0"]
    words += ["model.token_mixers=[mean,mean,mean,mean]"]
    cost = make_plan(tiny(*words), 1).cost
    shared = 4 * 3 * 64 * 128 + 9 * 64 + 2 * 512 * 64
    assert cost.num_parameters == shared + 4 * 7
    assert cost.num_active_parameters == shared + 4 * 5
    assert "model.token_mixers=mean cannot" in problems(2, "parallel=tp2", *words)
