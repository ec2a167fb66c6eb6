"""Adapters under every kind of layout: losses, gradients, norm and update are those of one rank.

B is drawn, because with B = 0 the gradient of A is zero and nothing would be compared.
"""

from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.lora_runs import adapter_gradients, adapter_update, lora_plan
from tests.parallel.short_runs import DISTRIBUTED_OPTIMIZER, EP2, PP2, TP2, relative_errors
from tests.parallel.test_gradients import GRADIENT_TOLERANCE, LOSS_TOLERANCE, SMALLEST_MARGIN

UPDATE_TOLERANCE = 1e-4
"""Relative, L2, fp32: gradients of the tiny model differ by up to 2e-5, see test_gradients."""
CP2 = ["parallel.context_parallel_size=2"]
ETP2 = ["parallel.expert_tensor_parallel_size=2"]
VPP2 = [*PP2, "parallel.virtual_pipeline_model_parallel_size=2"]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
FULL = ["parallel.recompute_granularity=full", "parallel.recompute_method=uniform"]
FULL += ["parallel.recompute_num_layers=1"]
SELECTIVE = ["parallel.recompute_granularity=selective"]
SELECTIVE += ["parallel.recompute_modules=[core_attn,mlp,moe,shared_experts]"]
LAYOUTS = {
    "dp2": (2, []),
    "tp2_sp": (2, TP2),
    "pp2": (2, PP2),
    "ep2": (2, EP2),
    "etp2": (2, ETP2),
    "cp2": (2, CP2),
    "tp2_ep2": (2, [*TP2, *EP2]),
    "tp2_etp2": (2, [*TP2, *ETP2]),
    "tp2_pp2_vpp2_full": (4, [*TP2, *VPP2, *FULL]),
    "full": (1, FULL),
    "selective": (1, SELECTIVE),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_adapters_match_one_rank(
    layout: str, found: dict[str, Any], fp64: None, on_ranks: OnRanks
) -> None:
    if not found:
        found.update(on_ranks(1, adapter_gradients, [])[0])
        assert found["margin"] > SMALLEST_MARGIN
        assert all(grad.any() for grad in found["gradients"].values())
        adapters = {name for name in found["names"] if name.endswith(("lora_a", "lora_b"))}
        assert found["gradients"].keys() == adapters
    ranks, overrides = LAYOUTS[layout]
    seen: set[str] = set()
    for result in on_ranks(ranks, adapter_gradients, overrides):
        assert result["losses"] == pytest.approx(found["losses"], abs=LOSS_TOLERANCE, rel=0)
        errors = relative_errors(result["gradients"], found["gradients"])
        assert not {n: error for n, error in errors.items() if error > GRADIENT_TOLERANCE}
        seen |= result["gradients"].keys()
    assert seen == found["gradients"].keys()


DENSE = ["model.channel_mixers=[dense,dense,dense,dense]", "model.mtp_num_layers=0"]
DENSE += ["model.num_moe_experts=null", "lora.targets=[linear_qkv,linear_proj,linear_gate,"]
DENSE[-1] += "mlp.linear_fc1,mlp.linear_fc2]"


def test_gradients_without_sequence_parallelism_match_one_rank(
    fp64: None, on_ranks: OnRanks
) -> None:
    reference = on_ranks(1, adapter_gradients, DENSE)[0]
    overrides = [*DENSE, *TP2, "parallel.sequence_parallel=false"]
    overrides.append("parallel.allow_uncertified=true")
    for result in on_ranks(2, adapter_gradients, overrides):
        assert result["losses"] == pytest.approx(reference["losses"], abs=LOSS_TOLERANCE, rel=0)
        errors = relative_errors(result["gradients"], reference["gradients"])
        assert not {n: error for n, error in errors.items() if error > GRADIENT_TOLERANCE}
        assert result["gradients"].keys() == reference["gradients"].keys()


def first_losses(overrides: list[str]) -> list[float]:
    """Return the losses of the first step of an initialised model."""
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import attach_schedule_callbacks
    from ring_train.train.step import forward_backward
    from tests.parallel.streams import make_micro_batches

    plan = lora_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        attach_schedule_callbacks(model, None, groups.collection)
        rows = make_micro_batches(plan, 0, groups.dp_rank)
        sums = forward_backward(model, rows, groups.collection, num_domains=1, loss_weights=None)
        return [float(sums.lm_loss), *sums.mtp_means().tolist()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_new_adapters_change_no_bit(precision: str, on_ranks: OnRanks) -> None:
    words = [f"train.precision={precision}", *TP2]
    plain = on_ranks(2, first_losses, [*words, "lora=none", "lora.rank=null"])
    assert on_ranks(2, first_losses, words) == plain


def overfit(overrides: list[str]) -> list[float]:
    """Return the loss of each step on the same rows."""
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step
    from tests.parallel.streams import make_micro_batches

    plan = lora_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        rows = make_micro_batches(plan, 0, groups.dp_rank)
        return [
            float(
                train_step(
                    plan, model, optimizer, rows, groups.collection, step=step, num_domains=1
                ).sums.lm_loss
            )
            for step in range(12)
        ]


def test_adapters_learn_a_few_rows_by_heart(on_ranks: OnRanks) -> None:
    losses = on_ranks(2, overfit, [*EP2, "optim.lr=2e-2", "train.micro_batch_size=2"])[0]
    assert losses[-1] < losses[0] - 1.0


UPDATE = ["optim.adam_eps=1", "optim.lr=1", "optim.lr_warmup_steps=0", "optim.clip_grad=0"]
"""With such an epsilon Adam's update is nearly linear in the gradients, see tests/layouts."""
UPDATED = {
    "dp2_sharded": (2, [*DISTRIBUTED_OPTIMIZER, *OVERLAP]),
    "pp2": (2, PP2),
    "ep2_etp2_sharded": (4, [*EP2, *ETP2, *DISTRIBUTED_OPTIMIZER]),
    "tp2_ep2_dp2_sharded": (4, [*TP2, *EP2, *DISTRIBUTED_OPTIMIZER, *OVERLAP]),
}


@pytest.fixture(scope="module")
def updated() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("layout", UPDATED)
def test_updates_of_adapters_match_one_rank_and_nothing_else_moves(
    layout: str, updated: dict[str, Any], on_ranks: OnRanks
) -> None:
    if not updated:
        updated.update(on_ranks(1, adapter_update, UPDATE)[0])
    ranks, overrides = UPDATED[layout]
    moved: set[str] = set()
    for result in on_ranks(ranks, adapter_update, [*UPDATE, *overrides]):
        for key in ("losses", "norms"):
            assert result[key] == pytest.approx(updated[key], rel=UPDATE_TOLERANCE, abs=0), key
        errors = relative_errors(result["moved"], updated["moved"])
        assert not {n: error for n, error in errors.items() if error > UPDATE_TOLERANCE}
        moved |= result["moved"].keys()
    assert moved == updated["moved"].keys()
    assert moved == {name for name in moved if name.endswith(("lora_a", "lora_b"))}
