"""A certificate: a folder held against the model that was trained, check by check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_train.config import ModelConfig, MtpExport, WeightFormat
from ring_train.hf.certificate.consumers import (
    ONE_BY_ONE_TOKENS,
    TOLERANCE,
    ConsumerError,
    Scores,
    compare_scores,
    run_transformers,
    run_vllm,
)
from ring_train.hf.certificate.conversations import compare_conversations, compare_tokenizer
from ring_train.hf.certificate.record import FORMAT_VERSION, Check, run_check
from ring_train.hf.certificate.settings import (
    compare_config,
    compare_decay,
    compare_generation,
    compare_rope,
    compare_router,
    is_linear,
)
from ring_train.hf.certificate.tensors import Read, compare_tensors, compare_weights
from ring_train.hf.config import read_json, read_model_config
from ring_train.hf.errors import HfError
from ring_train.hf.mtp import MTP_FOLDER
from ring_train.hf.training_turns import TrainingTurn
from ring_train.hf.writer import HfFormat, folder_configs

FOLDER_ONLY = "folder only"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the trainer's own model computes."""

    rows: Sequence[Sequence[int]]
    scores: dict[str, list[list[float]]]
    """{"logprobs", "mtp_logprobs", "mtp_logprobs_2", ...}, each per row and target."""
    generated: Sequence[tuple[list[int], list[float]]]
    """(prompt and answer, log-probabilities of the answer) by cached decoding."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a folder has to mean."""

    source: str | dict[str, Any]
    """`FOLDER_ONLY`, or which checkpoint."""
    model: ModelConfig
    """As trained; without MTP layers if they were left out on purpose."""
    mtp: MtpExport
    """Where they were put."""
    read: Read | None
    """Trained tensors by logical name; None if the folder is the only source."""
    reference: Callable[[Path, WeightFormat], Reference]
    """(folder, its format) -> what the trainer computes with weights rounded to that format."""
    turns: Sequence[TrainingTurn] | str
    """CONVERSATIONS as training sees them, or why that is not known."""
    end_of_turn: int | None
    """Special token that ends an answer in training."""
    tokenizer: Path | None
    """Tokenizer of the training data, if its folder is there."""


Transformers = Callable[[Path, Sequence[Sequence[int]]], dict[str, Any]]


def verify(
    folder: Path,
    truth: Truth,
    *,
    vllm: str | None = None,
    transformers: Transformers = run_transformers,
) -> dict[str, Any]:
    """Return the certificate of a folder; the folder is not written to.

    Runs the Python files of the folder.

    Args:
        folder: Hugging Face folder.
        truth: what it has to mean.
        vllm: Python of an environment with vLLM and our plugin.
        transformers: what runs transformers.
    """
    raw, weights, checks = _read_config(folder, truth)
    digests: dict[str, str] = {}
    checks.append(
        run_check("tensors", lambda: compare_tensors(folder, truth.model, weights, digests))
    )
    checks.append(_weights(folder, truth, weights))
    reference = truth.reference(folder, weights)
    rows = [*reference.rows, *(ids for ids, _ in reference.generated)]
    answer: dict[str, Any] | None = None
    try:
        answer = transformers(folder, rows)
        checks.append(_loading(answer))
        checks += _transformers_scores(reference, answer, truth.mtp)
    except ConsumerError as error:
        checks.append(Check(name="transformers", differences=[str(error)]))
    checks += _settings(truth, raw, digests, answer)
    checks += _texts(folder, truth, answer)
    checks += _vllm(folder, reference, vllm)
    return {
        "format": FORMAT_VERSION,
        "passed": not any(check.differences for check in checks),
        "source": truth.source,
        "tolerance": TOLERANCE,
        "rows": [len(row) for row in reference.rows],
        "versions": {} if answer is None else answer["versions"],
        "checks": {check.name: check.record() for check in checks},
        "tensors": digests,
        "report": [line for check in checks for line in check.lines()],
    }


def _read_config(
    folder: Path, truth: Truth
) -> tuple[dict[str, Any] | None, WeightFormat, list[Check]]:
    """Return config.json if it can be read, the format that it states, and the check of keys."""
    try:
        read_model_config(folder)
        raw = read_json(folder / "config.json")
    except HfError as error:
        return None, WeightFormat.fp32, [Check(name="config", differences=[str(error)])]
    weights = weight_format(raw)

    def compare() -> tuple[list[str], dict[str, Any]]:
        wanted = folder_configs(truth.model, HfFormat(weights=weights, mtp=truth.mtp))
        differences, num_keys = [], 0
        for name, config in wanted.items():
            found, figures = compare_config(read_json(folder / name / "config.json"), config)
            differences += [f"{name}/{line}" if name else line for line in found]
            num_keys += figures["num_keys"]
        return differences, {"num_keys": num_keys, "weights": weights.value}

    return raw, weights, [run_check("config", compare)]


def weight_format(raw: dict[str, Any]) -> WeightFormat:
    """Return the format of a folder's weights by its config.json."""
    if raw.get("quantization_config") is not None:
        return WeightFormat.fp8
    return WeightFormat.bf16 if raw.get("torch_dtype") == "bfloat16" else WeightFormat.fp32


def _weights(folder: Path, truth: Truth, weights: WeightFormat) -> Check:
    read = truth.read
    if read is None:
        reason = "without checkpoint=... there is nothing to compare them with"
        return Check(name="weights", not_run=reason)
    return run_check("weights", lambda: compare_weights(folder, truth.model, weights, read))


def _loading(answer: dict[str, Any]) -> Check:
    """Return whether transformers found a tensor for every parameter, and no other."""
    differences = [
        f"{len(names)} {kind.replace('_', ' ')}, first {names[0]}"
        for kind, names in answer["loading"].items()
        if names
    ]
    return Check(name="transformers_loading", differences=differences)


def _transformers_scores(
    reference: Reference, answer: dict[str, Any], mtp: MtpExport
) -> list[Check]:
    """Return the checks of log-probabilities: every way to read a row must give the trainer's."""
    num_rows = len(reference.rows)
    wanted = reference.scores["logprobs"]
    heads = {"logprobs": wanted, **(reference.scores if mtp is MtpExport.layer else {})}
    one_pass = [
        compare_scores(key, answer.get(key, [])[:num_rows], scores) for key, scores in heads.items()
    ]
    differences = [line for lines, _ in one_pass for line in lines]
    largest = max(apart for _, apart in one_pass)
    checks = [_scores_check("transformers_one_pass", differences, largest)]
    if len(heads) < len(reference.scores):
        reason = f"they lie in {MTP_FOLDER}/, which transformers does not load; see weights"
        checks.append(Check(name="transformers_mtp", not_run=reason))
    everything = {str(row): scores for row, scores in enumerate(answer["in_pieces"][:num_rows])}
    for name, found in (
        ("transformers_token_by_token", answer["one_by_one"]),
        ("transformers_prefill_in_pieces", everything),
        ("transformers_padded_batch", answer["padded"]),
    ):
        rows = [row for row in range(num_rows) if str(row) in found]
        if rows:
            scores = [found[str(row)] for row in rows]
            true = [wanted[row] for row in rows]
            checks.append(_scores_check(name, *compare_scores(name, scores, true)))
        else:
            reason = f"no row has at most {ONE_BY_ONE_TOKENS} tokens"
            checks.append(Check(name=name, not_run=reason))
    checks.append(_generation(reference, answer["logprobs"][num_rows:]))
    return checks


def _generation(reference: Reference, found: Scores) -> Check:
    """Return the check of what the trainer's cached decoding said about its own answers."""
    name = "trainer_generation"
    wanted = [logprobs for _, logprobs in reference.generated]
    answers = [row[-len(true) :] for row, true in zip(found, wanted, strict=True)]
    return _scores_check(name, *compare_scores(name, answers, wanted))


def _scores_check(name: str, differences: list[str], largest: float) -> Check:
    return Check(name=name, differences=differences, figures={"largest_difference": largest})


def _settings(
    truth: Truth,
    raw: dict[str, Any] | None,
    digests: dict[str, str],
    answer: dict[str, Any] | None,
) -> list[Check]:
    """Return the checks of what config.json means, and what the loaded model made of it."""
    names = ("decay", "rope", "router")
    if raw is None:
        return [Check(name=name, not_run="config.json cannot be read") for name in names]
    model, loaded = truth.model, answer or {}
    slopes = loaded.get("slopes") if is_linear(model) else None
    return [
        run_check("decay", lambda: compare_decay(raw, model, slopes)),
        run_check("rope", lambda: compare_rope(raw, model, loaded.get("rope"))),
        run_check(
            "router",
            lambda: compare_router(
                raw,
                model,
                digests,
                loaded.get("biases"),
                loads_mtp=truth.mtp is MtpExport.layer,
            ),
        ),
    ]


def _texts(folder: Path, truth: Truth, answer: dict[str, Any] | None) -> list[Check]:
    """Return the checks of tokenizer, chat template and stop tokens."""
    checks = []
    if truth.tokenizer is None:
        reason = "the tokenizer of the training data is not known here"
        checks.append(Check(name="tokenizer", not_run=reason))
    else:
        tokenizer = truth.tokenizer
        checks.append(run_check("tokenizer", lambda: compare_tokenizer(folder, tokenizer)))
    turns = truth.turns
    if isinstance(turns, str) or answer is None:
        reason = turns if isinstance(turns, str) else "transformers does not run the folder"
        checks.append(Check(name="chat", not_run=reason))
    else:
        rendered = answer["conversations"]
        checks.append(run_check("chat", lambda: compare_conversations(rendered, turns)))
    checks.append(
        run_check(
            "generation_config", lambda: compare_generation(folder, truth.model, truth.end_of_turn)
        )
    )
    return checks


VLLM_WAYS = {
    "vllm_one_pass": (),
    "vllm_prefill_in_pieces": ("--chunk-tokens", "64"),
    "vllm_token_by_token": ("--decode",),
}


def _vllm(folder: Path, reference: Reference, python: str | None) -> list[Check]:
    """Return the checks of vLLM's log-probabilities."""
    if python is None:
        reason = "vllm=PYTHON of an environment with vLLM was not given"
        return [Check(name=name, not_run=reason) for name in VLLM_WAYS]
    checks = []
    for name, options in VLLM_WAYS.items():
        try:
            found = run_vllm(python, folder, reference.rows, *options)
            scores = reference.scores["logprobs"]
            checks.append(_scores_check(name, *compare_scores(name, found, scores)))
        except ConsumerError as error:
            checks.append(Check(name=name, differences=[str(error)]))
    return checks
