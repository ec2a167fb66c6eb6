"""Batched generation under every layout writes what one sequence at a time on one rank writes.

In fp64, and with routing margins above the rounding of the router, so that no rounding can change
a choice: texts are compared token by token, and the
log-probabilities with those that the trainer's own scoring gives prompt and answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ring_train.config import Precision
from tests.conftest import OnRanks
from tests.parallel.short_runs import DISTRIBUTED_OPTIMIZER, EP2, PP2, TP2, short_plan

if TYPE_CHECKING:
    from ring_train.generation import Answer
    from ring_train.plan import Plan

TOLERANCE = 3e-6
"""Of a log-probability, nats: the router and megatron's cross-entropy stay in fp32 (about ten
roundings of 6e-8 of values up to 10); all else is fp64."""
SMALLEST_MARGIN = 1e-5
"""Far above the rounding of a routing score, so that nothing can flip an expert."""
TOLERANCE_BF16 = 0.1
"""Of a log-probability, nats: about 20 roundings of 2^-9 in values of size 1; one layer left out
gives 1 and more."""
CONTEXT = 140
LENGTHS = (1, 70, 3, 131, 64, 9, 2)
"""Of the prompts: one token, above two chunks of lightning attention, and one that the context
cuts; an odd number, so that replicas have different work."""
NUM_SAMPLES = 2
SLOTS = 3
PREFILL_TOKENS = 80
"""Below the longest prompt, which goes alone."""
STOP = tuple(range(0, 512, 16))
RUN = [f"model.max_position_embeddings={CONTEXT}", "model.init_method_std=0.3"]
CP2 = ["parallel.context_parallel_size=2"]
ETP2 = ["parallel.expert_tensor_parallel_size=2"]
VPP2 = [*PP2, "parallel.virtual_pipeline_model_parallel_size=2"]
LAYOUTS = {
    "tp2_sp": (2, TP2),
    "pp2": (2, PP2),
    "pp2_vpp2": (2, VPP2),
    "ep2": (2, EP2),
    "cp2": (2, CP2),
    "dp2": (2, []),
    "etp2": (2, ETP2),
    "tp2_pp2": (4, [*TP2, *PP2]),
    "tp2_ep2_dp2": (4, [*TP2, *EP2]),
}


def make_prompts() -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 512, (n,), generator=generator).tolist() for n in LENGTHS]


def samplings() -> list[Any]:
    from ring_train.generation import Sampling

    return [
        Sampling(max_new_tokens=6, stop_tokens=(), temperature=0),
        Sampling(max_new_tokens=8, stop_tokens=STOP, temperature=0.9, top_p=0.95, top_k=300),
    ]


def generate(overrides: list[str], slots: int, prefill_tokens: int) -> list[list[Answer]]:
    """Return the answers with each of `samplings`, and one answer alone."""
    from ring_train.generation import Generator
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime

    plan = short_plan([*RUN, *overrides])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        generator = Generator(
            plan, model, groups, max_batch_size=slots, max_prefill_tokens=prefill_tokens
        )
        greedy, sampled = samplings()
        return [
            *(generator.generate(make_prompts(), how, NUM_SAMPLES) for how in (greedy, sampled)),
            # Less work than replicas.
            generator.generate(make_prompts()[:1], sampled),
        ]


def scores_of(plan: Plan, model: Any, groups: Any, answers: list[Answer]) -> list[list[float]]:
    """Return the log-probabilities of answers by one pass over all prompts and answers."""
    from ring_train.data.batch import pack_documents
    from ring_train.train.scoring import token_losses

    prompts = make_prompts()
    documents = [prompts[answer.prompt] + answer.tokens for answer in answers]
    row = pack_documents(documents, num_mtp=plan.layers.num_mtp)
    (losses,) = token_losses(model, [row], groups)
    scores, end = [], 0
    for answer, document in zip(answers, documents, strict=True):
        end += len(document)
        scores.append((-losses[0, end - 1 - len(answer.tokens) : end - 1]).tolist())
    return scores


def generate_and_score(
    overrides: list[str], slots: int = SLOTS
) -> tuple[list[list[Answer]], list[list[float]]]:
    """Return the answers of `generate` on one rank, and the score of each, in one list."""
    from ring_train.generation import Generator
    from ring_train.model.build import build_model
    from ring_train.model.router import routers
    from ring_train.runtime.distributed import start_runtime

    plan = short_plan([*RUN, *overrides])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        for router in routers(model):
            router.track_margin = True
        generator = Generator(
            plan, model, groups, max_batch_size=slots, max_prefill_tokens=PREFILL_TOKENS
        )
        runs = [
            generator.generate(make_prompts(), sampling, NUM_SAMPLES) for sampling in samplings()
        ]
        if plan.config.train.precision is not Precision.bf16:
            assert min(router.margin for router in routers(model)) > SMALLEST_MARGIN
        answers = [answer for run in runs for answer in run]
        return runs, scores_of(plan, model, groups.collection, answers)


def assert_same(found: list[list[Answer]], expected: list[list[Answer]]) -> None:
    """Texts are equal, figures to rounding; what was asked alone is the first answer."""
    expected = [*expected, expected[1][:1]]
    for run, expected_run in zip(found, expected, strict=True):
        for answer, other in zip(run, expected_run, strict=True):
            assert answer.tokens == other.tokens, (answer.prompt, answer.sample)
            for name in ("prompt", "sample", "stopped"):
                assert getattr(answer, name) == getattr(other, name)
            for name in ("logprobs", "entropies"):
                expected_values = pytest.approx(getattr(other, name), abs=TOLERANCE, rel=0)
                assert getattr(answer, name) == expected_values


@pytest.fixture(scope="module")
def found() -> list[Any]:
    return []


def one_by_one(found: list[Any], on_ranks: OnRanks) -> list[list[Answer]]:
    """Return the reference, made once: one slot on one rank, and equal to its own scores."""
    if not found:
        runs, scores = on_ranks(1, generate_and_score, [], 1)[0]
        answers = [answer for run in runs for answer in run]
        for answer, score in zip(answers, scores, strict=True):
            assert answer.logprobs == pytest.approx(score, abs=TOLERANCE, rel=0)
        found.extend(runs)
    return found


def test_answers_are_what_was_asked_for(found: list[Any], fp64: None, on_ranks: OnRanks) -> None:
    greedy, sampled = one_by_one(found, on_ranks)
    pairs = [(prompt, sample) for prompt in range(len(LENGTHS)) for sample in range(NUM_SAMPLES)]
    for run, sampling in zip((greedy, sampled), samplings(), strict=True):
        assert [(answer.prompt, answer.sample) for answer in run] == pairs
        for answer in run:
            room = min(sampling.max_new_tokens, CONTEXT - LENGTHS[answer.prompt])
            assert len(answer.tokens) == len(answer.logprobs) == len(answer.entropies) <= room
            assert not set(answer.tokens[:-1]) & set(sampling.stop_tokens)
            assert answer.stopped == (answer.tokens[-1] in sampling.stop_tokens)
            assert answer.stopped or len(answer.tokens) == room
    assert greedy[0].tokens == greedy[1].tokens
    assert sampled[0].tokens != sampled[1].tokens
    assert {answer.stopped for answer in sampled} == {True, False}
    assert len(set(greedy[6].tokens)) > 3, "the model must not repeat itself"


@pytest.mark.parametrize(("slots", "prefill"), [(3, 80), (5, 1), (64, 4096)])
def test_a_batch_writes_what_one_by_one_writes(
    slots: int, prefill: int, found: list[Any], fp64: None, on_ranks: OnRanks
) -> None:
    expected = one_by_one(found, on_ranks)
    assert_same(on_ranks(1, generate, [], slots, prefill)[0], expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_write_what_one_rank_writes(
    layout: str, found: list[Any], fp64: None, on_ranks: OnRanks
) -> None:
    expected = one_by_one(found, on_ranks)
    ranks, overrides = LAYOUTS[layout]
    for answers in on_ranks(ranks, generate, overrides, SLOTS, PREFILL_TOKENS):
        assert_same(answers, expected)


MODELS = {
    "softmax_only": ["model.token_mixers=[gqa,gqa,gqa,gqa]"],
    "lightning_only": ["model.token_mixers=[lightning,lightning,lightning,lightning]"],
    "yarn": ["model.rotary_scaling_factor=4", "model.original_max_position_embeddings=40"],
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_agree_with_their_scores(kind: str, fp64: None, on_ranks: OnRanks) -> None:
    runs, scores = on_ranks(1, generate_and_score, MODELS[kind])[0]
    answers = [answer for run in runs for answer in run]
    for answer, score in zip(answers, scores, strict=True):
        assert answer.logprobs == pytest.approx(score, abs=TOLERANCE, rel=0)


def test_bf16_agrees_with_its_scores(on_ranks: OnRanks) -> None:
    overrides = ["train.precision=bf16", "model.init_method_std=0.05"]
    runs, scores = on_ranks(1, generate_and_score, overrides)[0]
    answers = [answer for run in runs for answer in run]
    for answer, score in zip(answers, scores, strict=True):
        assert answer.logprobs == pytest.approx(score, abs=TOLERANCE_BF16, rel=0)


def train_two_steps(overrides: list[str], between: bool) -> dict[str, Any]:
    """Return losses and final weights of two steps, with or without generation between them."""
    import torch

    from ring_train.generation import Generator
    from ring_train.model.build import build_model
    from ring_train.model.router import routers
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer, gather_parameters
    from ring_train.train.step import train_step
    from tests.parallel.short_runs import weights_by_name
    from tests.parallel.streams import make_micro_batches

    plan = short_plan(overrides)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        generator = Generator(
            plan, model, groups, max_batch_size=SLOTS, max_prefill_tokens=PREFILL_TOKENS
        )
        losses = []
        for step in range(2):
            rows = make_micro_batches(plan, step, groups.dp_rank)
            result = train_step(
                plan, model, optimizer, rows, groups.collection, step=step, num_domains=1
            )
            losses += [float(result.sums.lm_loss), result.grad_norm]
            if between and step == 0:
                counts = [router.tokens_per_expert.clone() for router in routers(model)]
                random = torch.get_rng_state()
                gather_parameters(model)
                generator.generate(make_prompts()[:3], samplings()[1])
                after = [router.tokens_per_expert for router in routers(model)]
                assert all(map(torch.equal, counts, after))
                assert torch.equal(random, torch.get_rng_state())
                assert all(module.training for chunk in model for module in chunk.modules())
        gather_parameters(model)
        weights = {name: tensor.numpy() for name, tensor in weights_by_name(model).items()}
        return {"losses": losses, "weights": weights}


TRAINED = {
    "one_rank": (1, []),
    "tp2_sp": (2, TP2),
    "dp2_overlap": (
        2,
        [
            *DISTRIBUTED_OPTIMIZER,
            "parallel.overlap_grad_reduce=true",
            "parallel.overlap_param_gather=true",
        ],
    ),
}


@pytest.mark.parametrize("layout", TRAINED)
def test_training_goes_on_bit_for_bit(layout: str, on_ranks: OnRanks) -> None:
    ranks, overrides = TRAINED[layout]
    plain = on_ranks(ranks, train_two_steps, overrides, False)
    for found, expected in zip(
        on_ranks(ranks, train_two_steps, overrides, True), plain, strict=True
    ):
        assert found["losses"] == expected["losses"]
        for name, weights in expected["weights"].items():
            assert (found["weights"][name] == weights).all(), name
