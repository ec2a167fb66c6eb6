"""A certificate: a folder held against the model that was trained, check by check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_train.config import ModelConfig, MtpExport, WeightFormat
from ring_train.hf.certificate.agreement import TOLERANCE
from ring_train.hf.certificate.computed import (
    Reference,
    Transformers,
    transformers_checks,
    vllm_checks,
)
from ring_train.hf.certificate.consumers import run_transformers
from ring_train.hf.certificate.conversations import (
    compare_conversations,
    compare_tokenizer,
    unreadable_tokenizer,
)
from ring_train.hf.certificate.python_files import compare_modeling_files
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
from ring_train.hf.training_turns import TrainingTurn
from ring_train.hf.writer import HfFormat, folder_configs

FOLDER_ONLY = "folder only"


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
    checks.append(run_check("modeling_files", lambda: compare_modeling_files(folder, truth.model)))
    reference: Reference | None = None
    answer: dict[str, Any] | None = None
    try:
        reference = truth.reference(folder, weights)
    except HfError as error:
        checks.append(Check(name="trainer", differences=[str(error)]))
    if reference is not None:
        found, answer = transformers_checks(folder, truth.model, truth.mtp, reference, transformers)
        checks += found
        checks += vllm_checks(folder, reference, vllm)
    checks += _settings(truth, raw, digests, answer)
    checks += _texts(folder, truth, answer)
    return {
        "format": FORMAT_VERSION,
        "passed": not any(check.differences or check.is_open for check in checks),
        "source": truth.source,
        "tolerance": TOLERANCE,
        "rows": [] if reference is None else [len(row) for row in reference.rows],
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
        faults = unreadable_tokenizer(folder)
        not_run = None if faults else reason
        checks.append(Check(name="tokenizer", differences=faults, not_run=not_run))
    else:
        tokenizer = truth.tokenizer
        checks.append(run_check("tokenizer", lambda: compare_tokenizer(folder, tokenizer)))
    turns = truth.turns
    if answer is not None and "tokenizer_fault" in answer:
        checks.append(Check(name="chat", differences=[answer["tokenizer_fault"]]))
    elif isinstance(turns, str) or answer is None:
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
