"""Greedy answers of a released kind of folder are those of transformers on its modeling files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.unit.hf.test_modeling import GOLDEN, load, make_folder

LENGTHS = (1, 24, 100)
NEW_TOKENS = 16
SMALLEST_GAP = 1e-3
"""Between the two largest logits at every token, far above fp32 rounding of 1e-5."""
LOGPROB_TOLERANCE = 1e-4
"""fp32: five noise floors of the folder, tests/golden/README.md."""
CASES = {
    "ling": ("ling_v2", None, "expected.json"),
    "ring_shifted": ("ring_linear_v2", "shifted", "expected_hf_rule.json"),
    "ring_lite": ("ring_lite_v1", None, "expected.json"),
}


def generate(folder: str, rule: str | None, prompts: list[list[int]]) -> list[Any]:
    """Return (tokens, log-probabilities) of greedy answers in the trainer's own model."""
    from ring_train.config import ScoreConfig, compose
    from ring_train.generation import Generator, Sampling
    from ring_train.hf.config import read_model_config
    from ring_train.hf.weights import load_hf_weights
    from ring_train.jobs.score import score_plan
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime

    words = [f"hf_dir={folder}", "prompts=unused", "output=unused"]
    config: ScoreConfig = compose(
        "score", [*words, *([f"decay_layer_rule={rule}"] if rule else [])]
    )
    model_config = read_model_config(folder, config.decay_layer_rule)
    plan = score_plan(config, model_config, prompts)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        load_hf_weights(Path(folder), plan.config.model, model)
        generator = Generator(plan, model, groups, max_batch_size=2, max_prefill_tokens=64)
        sampling = Sampling(max_new_tokens=NEW_TOKENS, stop_tokens=(), temperature=0)
        return [(a.tokens, a.logprobs) for a in generator.generate(prompts, sampling)]


def answers_of_transformers(folder: Path, prompts: list[list[int]]) -> list[Any]:
    """Return the same of transformers, and check that no rounding could change a choice."""
    import torch

    model = load(folder).eval()
    answers = []
    for prompt in prompts:
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = torch.cat(out.logits)  # [tokens, v]
        best = logits.topk(2).values
        assert float((best[:, 0] - best[:, 1]).min()) > SMALLEST_GAP
        tokens = out.sequences[0, len(prompt) :]
        scores = logits.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
        answers.append((tokens.tolist(), scores.tolist()))
    return answers


@pytest.mark.parametrize("case", CASES)
def test_greedy_answers_are_those_of_transformers(
    case: str, on_ranks: OnRanks, tmp_path: Path
) -> None:
    name, rule, expected = CASES[case]
    known = json.loads((GOLDEN / name / expected).read_text())["prompts"][-1]
    prompts = [known[:length] for length in LENGTHS]
    (ours,) = on_ranks(1, generate, str(GOLDEN / name), rule, prompts)
    theirs = answers_of_transformers(make_folder(tmp_path / case, name, rule), prompts)
    for (tokens, scores), (their_tokens, their_scores) in zip(ours, theirs, strict=True):
        assert tokens == their_tokens
        assert scores == pytest.approx(their_scores, abs=LOGPROB_TOLERANCE, rel=0)
