"""What the trainer's own model computes from given tensors, on one rank, in fp32."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ring_train.config import ModelConfig, ParallelConfig, Precision
from ring_train.errors import UserError
from ring_train.jobs.forward_config import forward_config
from ring_train.plan import Plan, make_plan

if TYPE_CHECKING:
    import torch

    from ring_train.hf.certificate.computed import Reference
    from ring_train.runtime.distributed import Groups

PROMPT_TOKENS, ANSWER_TOKENS = 40, 12
"""Of what cached decoding writes after the beginning of each row."""


def score_reference(
    model: ModelConfig,
    read: Callable[[str], torch.Tensor],
    rows: Sequence[Sequence[int]],
) -> Reference:
    """Return log-probabilities of rows, and greedy answers to their beginnings.

    Args:
        model: as trained.
        read: logical name -> whole tensor.
        rows: token ids.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this job runs on one rank; start it without torchrun")
    base = forward_config(
        model,
        ParallelConfig(),
        precision=Precision.fp32,
        row_tokens=max(len(row) for row in rows) + ANSWER_TOKENS,
        num_rows=len(rows),
    )
    plan = make_plan(base, 1)

    import ring_train.platform  # noqa: F401  (heavy imports only after the plan holds)
    from ring_train.hf.certificate.computed import Reference
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import attach_schedule_callbacks
    from ring_train.train.scoring import make_rows, score_rows

    with start_runtime(plan) as groups:
        chunks = build_model(plan, groups.collection)
        fill(chunks, read)
        attach_schedule_callbacks(chunks, None, groups.collection)
        batches = make_rows(plan, rows, groups.dp_rank, packed=False)
        scores = score_rows(chunks, batches, rows, groups, packed=False)
        return Reference(rows=rows, scores=scores, generated=_generate(plan, chunks, groups, rows))


def fill(chunks: list, read: Callable[[str], torch.Tensor]) -> None:
    """Copy every tensor into the model."""
    import torch

    from ring_train.model.tensors import local_tensors

    with torch.no_grad():
        for item in local_tensors(chunks):
            item.tensor.copy_(item.shard.of(read(item.name)))


def _generate(
    plan: Plan, chunks: list, groups: Groups, rows: Sequence[Sequence[int]]
) -> list[tuple[list[int], list[float]]]:
    """Return (prompt and answer, log-probabilities of the answer) by cached greedy decoding."""
    from ring_train.generation import Generator, Sampling

    prompts = [list(row[:PROMPT_TOKENS]) for row in rows]
    generator = Generator(
        plan, chunks, groups, max_batch_size=len(prompts), max_prefill_tokens=2 * PROMPT_TOKENS
    )
    sampling = Sampling(max_new_tokens=ANSWER_TOKENS, stop_tokens=(), temperature=0.0)
    answers = generator.generate(prompts, sampling)
    return [([*prompts[a.prompt], *a.tokens], a.logprobs) for a in answers]


def read_rows(path: str | None, folder: Path, model: ModelConfig) -> list[list[int]]:
    """Return the rows of a file, or those of every certificate."""
    from ring_train.hf.certificate.prompts import certificate_rows
    from ring_train.jobs.score import read_prompts

    if path is not None:
        return read_prompts(Path(path))
    return certificate_rows(folder, model)
