"""What programs compute from a folder, against what the trainer's own model computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ring_train.config import ModelConfig, MtpExport
from ring_train.hf.certificate.agreement import Scores, Tie, Ties, compare_scores, scores_check
from ring_train.hf.certificate.consumers import (
    ONE_BY_ONE_TOKENS,
    ConsumerError,
    Rows,
    run_vllm,
)
from ring_train.hf.certificate.record import Check
from ring_train.hf.errors import HfError
from ring_train.hf.mtp import MTP_FOLDER

Transformers = Callable[[Path, Rows, Rows], dict[str, Any]]
"""(folder, rows, answers) -> what `probe` answers."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the trainer's own model computes."""

    rows: Sequence[Sequence[int]]
    scores: dict[str, list[list[float]]]
    """{"logprobs", "mtp_logprobs", "mtp_logprobs_2", ...}, each per row and target."""
    generated: Sequence[tuple[list[int], list[float]]]
    """(prompt and answer, log-probabilities of the answer) by cached decoding."""
    ties: Mapping[str, Ties]
    """Of each row, by key of `scores`."""
    answer_ties: Ties
    """Of each of `generated`."""


def _loading(answer: dict[str, Any]) -> Check:
    """Return whether transformers found a tensor for every parameter, and no other."""
    differences = [
        f"{len(names)} {kind.replace('_', ' ')}, first {names[0]}"
        for kind, names in answer["loading"].items()
        if names
    ]
    return Check(name="transformers_loading", differences=differences)


def transformers_checks(
    folder: Path,
    model: ModelConfig,
    mtp: MtpExport,
    reference: Reference,
    transformers: Transformers,
) -> tuple[list[Check], dict[str, Any] | None]:
    """Return the checks of what transformers computes, and its whole answer if there is one."""
    answers = [ids for ids, _ in reference.generated]
    try:
        answer = transformers(folder, reference.rows, answers)
    except (ConsumerError, HfError) as error:
        return [Check(name="transformers", differences=[str(error)])], None
    checks = [
        _loading(answer),
        *_one_pass(reference, answer, mtp),
        *_other_ways(reference, answer),
        _generation(reference, answer["answers"]["logprobs"]),
    ]
    if model.rotary_scaling_factor != 1:
        checks.append(_stretched(model, reference, answer["logprobs"]))
    return checks, answer


def _one_pass(reference: Reference, answer: dict[str, Any], mtp: MtpExport) -> list[Check]:
    """Return the check of log-probabilities of all heads, each row read at once."""
    heads = {"logprobs": reference.scores["logprobs"]}
    if mtp is MtpExport.layer:
        heads |= reference.scores
    compared = [
        compare_scores(key, answer.get(key, []), scores, reference.ties[key])
        for key, scores in heads.items()
    ]
    checks = [scores_check("transformers_one_pass", *compared)]
    if len(heads) < len(reference.scores):
        reason = f"they lie in {MTP_FOLDER}/, which transformers does not load; see weights"
        checks.append(Check(name="transformers_mtp", not_run=reason))
    return checks


def _other_ways(reference: Reference, answer: dict[str, Any]) -> list[Check]:
    """Return the checks of rows that are read with a cache, or beside others."""
    wanted = reference.scores["logprobs"]
    pieces = {str(row): scores for row, scores in enumerate(answer["in_pieces"])}
    checks = []
    for name, found in (
        ("transformers_token_by_token", answer["one_by_one"]),
        ("transformers_prefill_in_pieces", pieces),
        ("transformers_padded_batch", answer["padded"]),
    ):
        rows = [row for row in range(len(wanted)) if str(row) in found]
        if rows:
            scores = {row: found[str(row)] for row in rows}
            checks.append(_check_of_rows(name, reference, scores))
        else:
            reason = f"no row has at most {ONE_BY_ONE_TOKENS} tokens"
            checks.append(Check(name=name, not_run=reason))
    return checks


def _stretched(model: ModelConfig, reference: Reference, found: Scores) -> Check:
    """Return the check of rows that are longer than the context which YaRN stretches."""
    name, context = "transformers_past_original_context", model.original_max_position_embeddings
    assert context is not None
    rows = [i for i, row in enumerate(reference.rows) if len(row) > context]
    if not rows:
        reason = f"no row is longer than {context} tokens; give some by prompts=FILE"
        return Check(name=name, not_run=reason)
    return _check_of_rows(name, reference, {row: found[row] for row in rows})


def _check_of_rows(name: str, reference: Reference, found: Mapping[int, Sequence[float]]) -> Check:
    """Return the check of the next-token log-probabilities of some rows, by their number."""
    wanted, ties = reference.scores["logprobs"], reference.ties["logprobs"]
    compared = compare_scores(
        name, [*found.values()], [wanted[row] for row in found], [ties[row] for row in found]
    )
    return scores_check(name, compared)


def _generation(reference: Reference, found: Scores) -> Check:
    """Return the check of what the trainer's cached decoding said about its own answers."""
    name = "trainer_generation"
    wanted = [logprobs for _, logprobs in reference.generated]
    answers = [row[-len(true) :] for row, true in zip(found, wanted, strict=True)]
    starts = [len(row) - len(true) for row, true in zip(found, wanted, strict=True)]
    ties = [
        tie and Tie(token=max(tie.token - start, 0), margin=tie.margin)
        for tie, start in zip(reference.answer_ties, starts, strict=True)
    ]
    return scores_check(name, compare_scores(name, answers, wanted, ties))


VLLM_WAYS = {
    "vllm_one_pass": (),
    "vllm_prefill_in_pieces": ("--chunk-tokens", "64"),
    "vllm_token_by_token": ("--decode",),
}


def vllm_checks(folder: Path, reference: Reference, python: str | None) -> list[Check]:
    """Return the checks of vLLM's log-probabilities."""
    if python is None:
        reason = "vllm=PYTHON of an environment with vLLM was not given"
        return [Check(name=name, not_run=reason) for name in VLLM_WAYS]
    checks = []
    for name, options in VLLM_WAYS.items():
        try:
            found = run_vllm(python, folder, reference.rows, *options)
            scores, ties = reference.scores["logprobs"], reference.ties["logprobs"]
            checks.append(scores_check(name, compare_scores(name, found, scores, ties)))
        except ConsumerError as error:
            checks.append(Check(name=name, differences=[str(error)]))
    return checks
