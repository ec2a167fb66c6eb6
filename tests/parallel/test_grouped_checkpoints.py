"""What grouped experts save, experts one by one resume, and the reverse, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import DISTRIBUTED_OPTIMIZER, EP2, TP2, short_plan, weights_by_name
from tests.parallel.test_checkpoint_layouts import (
    BF16,
    BF16_LOSS_TOLERANCE,
    LOSS_TOLERANCE,
    SAVED_STEP,
    digests,
    resume,
    train_and_save,
)
from tests.parallel.test_grouped_experts import ETP2, GROUPED, SEQUENTIAL
from tests.parallel.test_training_layouts import FIGURES, reference_run, train
from tests.parallel.test_training_layouts import LOSS_TOLERANCE as TRAINING_TOLERANCE
from tests.unit.hf.conftest import GOLDEN

PAIRS = {
    "one_by_one_to_grouped": (1, SEQUENTIAL, 1, GROUPED),
    "grouped_to_one_by_one_sharded": (1, GROUPED, 2, [*SEQUENTIAL, *DISTRIBUTED_OPTIMIZER]),
    "one_by_one_to_grouped_sharded_bf16": (
        2,
        [*SEQUENTIAL, *DISTRIBUTED_OPTIMIZER, *BF16],
        2,
        [*GROUPED, *DISTRIBUTED_OPTIMIZER, *BF16],
    ),
    "grouped_sharded_bf16_to_one_by_one": (
        4,
        [*GROUPED, *EP2, *DISTRIBUTED_OPTIMIZER, *BF16, "train.micro_batch_size=1"],
        1,
        [*SEQUENTIAL, *BF16],
    ),
    "grouped_over_expert_tensors_to_one_by_one_over_experts": (
        2,
        [*GROUPED, *ETP2],
        2,
        [*SEQUENTIAL, *EP2],
    ),
}
"""(ranks and overrides that save, ranks and overrides that resume)."""


@pytest.mark.parametrize("pair", PAIRS)
def test_what_one_way_saves_the_other_continues(
    pair: str, on_ranks: OnRanks, tmp_path: Path
) -> None:
    first_ranks, first, second_ranks, second = PAIRS[pair]
    expected = on_ranks(first_ranks, train_and_save, tmp_path, first)
    shutil.copytree(tmp_path / "checkpoints", tmp_path / "resumed" / "checkpoints")
    found = on_ranks(second_ranks, resume, tmp_path / "resumed", second)
    before = digests(tmp_path, SAVED_STEP)
    assert digests(tmp_path / "resumed", SAVED_STEP + 1) == before
    kinds = {"weight", "exp_avg", "exp_avg_sq", "rng"} | ({"master"} if "bf16" in pair else set())
    assert {key.split("/")[0] for key in before} == kinds
    assert any(".experts.7.linear_fc2.weight" in key for key in before)
    tolerance = BF16_LOSS_TOLERANCE if "bf16" in pair else LOSS_TOLERANCE
    assert [part.loss for part in found] == pytest.approx(
        [expected[0].loss] * len(found), rel=tolerance, abs=0
    )


def new_weights(overrides: list[str]) -> dict[str, Any]:
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime

    plan = short_plan(overrides)
    with start_runtime(plan) as groups:
        return weights_by_name(build_model(plan, groups.collection))


@pytest.mark.parametrize("layout", ["one_rank", "tp2_ep2_etp2"])
def test_new_weights_are_the_same_by_name(layout: str, on_ranks: OnRanks) -> None:
    ranks, overrides = (1, []) if layout == "one_rank" else (4, [*TP2, *EP2, *ETP2])
    one_by_one = on_ranks(1, new_weights, SEQUENTIAL)[0]
    seen: set[str] = set()
    for part in on_ranks(ranks, new_weights, [*GROUPED, *overrides]):
        assert not [name for name, weight in part.items() if not weight.equal(one_by_one[name])]
        seen |= part.keys()
    assert seen == one_by_one.keys()


def read_and_generate(experts: str, prompts: list[list[int]]) -> tuple[dict[str, Any], list[Any]]:
    """Return the weights of the golden hybrid by name, and greedy (tokens, log-probabilities)."""
    from ring_train.config import ExpertKernel, compose
    from ring_train.generation import Generator, Sampling
    from ring_train.hf.config import read_model_config
    from ring_train.hf.weights import load_hf_weights
    from ring_train.jobs.score import score_plan
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime

    folder = GOLDEN / "ring_linear_v2"
    words = [f"hf_dir={folder}", "prompts=unused", "output=unused", "decay_layer_rule=shifted"]
    config: Any = compose("score", words)
    plan = score_plan(config, read_model_config(folder, config.decay_layer_rule), prompts)
    plan.config.kernels.experts = ExpertKernel(experts)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        load_hf_weights(folder, plan.config.model, model)
        generator = Generator(plan, model, groups, max_batch_size=2, max_prefill_tokens=64)
        sampling = Sampling(max_new_tokens=8, stop_tokens=(), temperature=0)
        answers = generator.generate(prompts, sampling)
        return weights_by_name(model), [(a.tokens, a.logprobs) for a in answers]


def test_imported_weights_and_answers_are_the_same(on_ranks: OnRanks) -> None:
    prompts = [[5, 9, 2, 40, 7], [11, 3, 60]]
    ((weights, answers),) = on_ranks(1, read_and_generate, "grouped", prompts)
    ((expected, expected_answers),) = on_ranks(1, read_and_generate, "sequential", prompts)
    assert weights.keys() == expected.keys()
    assert not [name for name, weight in weights.items() if not weight.equal(expected[name])]
    for (tokens, scores), (right_tokens, right_scores) in zip(
        answers, expected_answers, strict=True
    ):
        assert tokens == right_tokens
        assert scores == pytest.approx(right_scores, abs=LOSS_TOLERANCE, rel=0)


NUM_STEPS = 5
TRAINED = {
    "one_rank": (1, GROUPED),
    "tp2_ep2_distributed_optimizer": (4, [*GROUPED, *TP2, *EP2, *DISTRIBUTED_OPTIMIZER]),
    "recomputed": (
        1,
        [
            *GROUPED,
            "parallel.recompute_granularity=selective",
            "parallel.recompute_modules=[moe]",
        ],
    ),
}


@pytest.fixture(scope="module")
def reference() -> dict[str, list[float]]:
    return {}


@pytest.mark.parametrize("layout", TRAINED)
def test_training_matches_experts_one_by_one(
    layout: str, reference: dict[str, list[float]], on_ranks: OnRanks
) -> None:
    expected = reference_run(on_ranks, reference)
    ranks, overrides = TRAINED[layout]
    for figures in on_ranks(ranks, train, overrides, NUM_STEPS):
        for key in FIGURES:
            found = figures[key]
            assert found == pytest.approx(expected[key][:NUM_STEPS], abs=TRAINING_TOLERANCE, rel=0)
