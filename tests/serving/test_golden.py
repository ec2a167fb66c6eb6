"""Log-probabilities of the golden models in vLLM: in one pass, in chunks, token by token."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ring_linear_vllm.attention import RingLinearAttention
from ring_linear_vllm.engine import decode_logprobs, prompt_logprobs
from vllm import LLM

from tests.serving.folders import expected

ABSOLUTE = 1e-4
"""In fp32; the golden vectors are within 3e-5 of double precision themselves."""
OTHER_RULE = 1.0
"""The wrong decay rule moves some log-probability by at least this much."""
CHUNK_TOKENS = 17
"""Divides no prompt, and leaves single tokens for the first chunk of a prompt."""

LINEAR = ["zero_based", "shifted"]
ALL = [*LINEAR, "softmax", "first"]


@pytest.fixture(scope="module", params=ALL)
def name(request: pytest.FixtureRequest) -> str:
    """One folder after the other, so that tests share its engine."""
    return request.param


def largest_difference(got: list[list[float]], wanted: list[list[float]]) -> float:
    assert [len(row) for row in got] == [len(row) for row in wanted]
    return max(
        abs(x - y) for a, b in zip(got, wanted, strict=True) for x, y in zip(a, b, strict=True)
    )


def test_a_batch_of_prompts_in_one_pass(engine_of: Callable[..., LLM], name: str) -> None:
    golden = expected(name)
    got = prompt_logprobs(engine_of(name), golden["prompts"])
    assert largest_difference(got, golden["logprobs"]) < ABSOLUTE


def test_a_batch_token_by_token_in_slots_that_were_used(
    engine_of: Callable[..., LLM], name: str
) -> None:
    golden = expected(name)
    engine = engine_of(name)
    for _ in range(3):
        got = decode_logprobs(engine, golden["prompts"])
        assert largest_difference(got, golden["logprobs"]) < ABSOLUTE


def test_prefill_in_chunks_beside_decoding(engine_of: Callable[..., LLM], name: str) -> None:
    golden = expected(name)
    engine = engine_of(name, chunk_tokens=CHUNK_TOKENS)
    for _ in range(3):
        got = prompt_logprobs(engine, golden["prompts"])
        assert largest_difference(got, golden["logprobs"]) < ABSOLUTE


@pytest.mark.parametrize(("rule", "other"), [LINEAR, LINEAR[::-1]])
def test_the_decay_rule_of_the_folder_decides(
    engine_of: Callable[..., LLM], rule: str, other: str
) -> None:
    golden = expected(other)
    got = prompt_logprobs(engine_of(rule, chunk_tokens=CHUNK_TOKENS), golden["prompts"])
    assert largest_difference(got, golden["logprobs"]) > OTHER_RULE


def test_the_state_is_fp32_in_a_bf16_model(engine_of: Callable[..., LLM]) -> None:
    engine = engine_of("zero_based", dtype="bfloat16")
    golden = expected("zero_based")
    rows = prompt_logprobs(engine, golden["prompts"]) + decode_logprobs(engine, golden["prompts"])
    assert all(torch.tensor(row).isfinite().all() for row in rows)

    def dtypes(model: torch.nn.Module) -> list[torch.dtype]:
        layers = [m for m in model.modules() if isinstance(m, RingLinearAttention)]
        assert len(layers) == 2
        assert all(layer.dense.weight.dtype == torch.bfloat16 for layer in layers)
        return [layer.kv_cache[0].dtype for layer in layers]

    assert engine.apply_model(dtypes) == [[torch.float32] * 2]


def test_two_tensor_parallel_ranks(folders: dict[str, Path], tmp_path: Path) -> None:
    golden = expected("shifted")
    prompts, scores = tmp_path / "prompts.json", tmp_path / "scores.json"
    prompts.write_text(json.dumps({"prompts": golden["prompts"]}))
    module = [sys.executable, "-m", "ring_linear_vllm.score", "--tensor-parallel-size", "2"]
    paths = ["--model", folders["shifted"], "--prompts", prompts, "--output", scores]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    subprocess.run([*module, *paths], check=True, env=environment)
    got = json.loads(scores.read_text())["logprobs"]
    assert largest_difference(got, golden["logprobs"]) < ABSOLUTE
