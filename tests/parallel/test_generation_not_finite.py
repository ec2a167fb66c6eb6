"""Logits that are not finite end generation on every rank alike, with an error and no hang."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import EP2, PP2, TP2, short_plan

LAYOUTS = {
    "one_rank": (1, []),
    "tp2_sp": (2, TP2),
    "pp2": (2, PP2),
    "ep2": (2, EP2),
    "cp2": (2, ["parallel.context_parallel_size=2"]),
    "dp2": (2, []),
    "tp2_ep2_dp2": (4, [*TP2, *EP2]),
}
WRONG_TOKEN = 7
PROMPTS = [[1], [2, WRONG_TOKEN, 4], [5, 6], [8, 9, 10], [3], [11, 12]]
"""Prompt 1 is on the second of two replicas."""
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {},
    "cut": {"top_k": 20, "top_p": 0.9},
}


def set_not_finite(model: Any, groups: Any, where: str, value: float) -> None:
    """Write the value into the output weight, or into the embedding of WRONG_TOKEN."""
    import torch

    chunk, group = model[0 if where == "embedding" else -1].module, groups.collection.tp
    weight = None
    if where == "embedding" and groups.collection.pp.rank() == 0:
        weight = chunk.embedding.word_embeddings.weight
    if where == "output" and groups.is_last_stage:
        weight = chunk.output_layer.weight
    first = 0 if weight is None else group.rank() * len(weight)
    if weight is not None and first <= WRONG_TOKEN < first + len(weight):
        with torch.no_grad():
            weight[WRONG_TOKEN - first] = value


def errors_of(overrides: list[str], where: str, value: float) -> list[str]:
    """Return what generation says with each of SAMPLINGS."""
    from ring_train.errors import UserError
    from ring_train.generation import Generator, Sampling
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime

    plan = short_plan(["model.max_position_embeddings=40", *overrides])
    messages = []
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        set_not_finite(model, groups, where, value)
        generator = Generator(plan, model, groups, max_batch_size=2, max_prefill_tokens=64)
        for how in SAMPLINGS.values():
            # An answer that writes the token ends there, before it is read.
            sampling = Sampling(max_new_tokens=5, stop_tokens=(WRONG_TOKEN,), **how)
            with pytest.raises(UserError) as caught:
                generator.generate(PROMPTS, sampling, num_samples=2)
            messages.append(str(caught.value))
    return messages


def expected_error(prompt: int) -> str:
    return (
        f"the model's logits are not finite after 0 tokens of prompt {prompt}: the weights have "
        "diverged; take an earlier checkpoint, and train on from there with a smaller optim.lr"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_raise_for_weights_that_are_not_finite(
    layout: str, value: float, on_ranks: OnRanks
) -> None:
    ranks, overrides = LAYOUTS[layout]
    found = on_ranks(ranks, errors_of, overrides, "output", value)
    assert found == [[expected_error(0)] * len(SAMPLINGS)] * ranks


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_raise_for_the_prompt_of_one_replica(layout: str, on_ranks: OnRanks) -> None:
    ranks, overrides = LAYOUTS[layout]
    found = on_ranks(ranks, errors_of, overrides, "embedding", float("nan"))
    assert found == [[expected_error(1)] * len(SAMPLINGS)] * ranks
