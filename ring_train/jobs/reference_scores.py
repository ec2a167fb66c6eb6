"""What the trainer's own model computes from given tensors, on one rank, in fp32."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ring_train.config import ModelConfig, ParallelConfig, Precision
from ring_train.errors import UserError
from ring_train.jobs.forward_config import forward_config
from ring_train.plan import Plan, make_plan

if TYPE_CHECKING:
    import torch

    from ring_train.hf.certificate.agreement import Tie
    from ring_train.hf.certificate.computed import Reference
    from ring_train.runtime.distributed import Groups

MAX_DRAWS = 3
"""Of a row that a tie ends in its first half."""
PROMPT_TOKENS, ANSWER_TOKENS = 40, 12
"""Of what cached decoding writes after the beginning of each row."""


def score_reference(
    model: ModelConfig,
    read: Callable[[str], torch.Tensor],
    rows: Sequence[Sequence[int]],
    others: Iterator[int] | None = None,
) -> Reference:
    """Return log-probabilities of rows, and greedy answers to their beginnings.

    Args:
        model: as trained.
        read: logical name -> whole tensor.
        rows: token ids.
        others: endless ids; rows that a routing tie ends early are drawn again from them.
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

    with start_runtime(plan) as groups:
        chunks = build_model(plan, groups.collection)
        fill(chunks, read)
        attach_schedule_callbacks(chunks, None, groups.collection)
        table = _score(plan, chunks, groups, rows)
        if others is not None:
            table = _drawn_again(plan, chunks, groups, table, others)
        rows = [scored.row for scored in table]
        generated = _generate(plan, chunks, groups, rows)
        answers = _score(plan, chunks, groups, [ids for ids, _ in generated])
        return Reference(
            rows=rows,
            scores={key: [scored.scores[key] for scored in table] for key in table[0].scores},
            generated=generated,
            ties={key: [scored.ties[key] for scored in table] for key in table[0].ties},
            answer_ties=[scored.ties["logprobs"] for scored in answers],
        )


@dataclass(frozen=True, kw_only=True)
class ScoredRow:
    """A row of tokens, and by head its log-probabilities and the first tie of its routing."""

    row: Sequence[int]
    scores: dict[str, list[float]]
    ties: dict[str, Tie | None]

    @property
    def clear_tokens(self) -> int:
        """Tokens before the first tie of the trunk."""
        tie = self.ties["logprobs"]
        return len(self.row) if tie is None else tie.token


def _score(
    plan: Plan, chunks: list, groups: Groups, rows: Sequence[Sequence[int]]
) -> list[ScoredRow]:
    """Return log-probabilities and routing ties of rows."""
    from ring_train.model.router import routers
    from ring_train.train.scoring import make_rows, score_rows

    found = list(routers(chunks))
    for router in found:
        router.track_margin = True
        router.token_margins.clear()
    batches = make_rows(plan, rows, groups.dp_rank, packed=False)
    scores = score_rows(chunks, batches, rows, groups, packed=False)
    result = []
    for index, row in enumerate(rows):
        ties = {}
        for depth, key in enumerate(scores):
            margins = [
                router.token_margins[index][: len(row)]
                for router in found
                if not router.is_mtp_layer or int(router.layer_number or 0) <= depth
            ]
            ties[key] = _first_tie(margins)
        mine = {key: values[index] for key, values in scores.items()}
        result.append(ScoredRow(row=row, scores=mine, ties=ties))
    return result


def _first_tie(margins: list[torch.Tensor]) -> Tie | None:
    """Return the first token that a layer routes by less than rounding; margins [t] by layer."""
    from ring_train.hf.certificate.agreement import TIE_MARGIN, Tie

    smallest = [min(layers) for layers in zip(*(m.tolist() for m in margins), strict=True)]
    near = (i for i, margin in enumerate(smallest) if margin < TIE_MARGIN)
    token = next(near, None)
    return None if token is None else Tie(token=token, margin=smallest[token])


def _drawn_again(
    plan: Plan, chunks: list, groups: Groups, table: list[ScoredRow], others: Iterator[int]
) -> list[ScoredRow]:
    """Return the rows, those with a tie in their first half drawn again as often as is allowed."""
    table = list(table)
    for _ in range(MAX_DRAWS):
        early = [i for i, one in enumerate(table) if one.clear_tokens < len(one.row) // 2]
        if not early:
            break
        drawn = [list(islice(others, len(table[i].row))) for i in early]
        for place, scored in zip(early, _score(plan, chunks, groups, drawn), strict=True):
            table[place] = max(table[place], scored, key=lambda one: one.clear_tokens)
    return table


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


def read_rows(
    path: str | None, folder: Path, model: ModelConfig
) -> tuple[list[list[int]], Iterator[int] | None]:
    """Return the rows of a file, or those of every certificate and ids of others."""
    from ring_train.hf.certificate.prompts import certificate_rows
    from ring_train.jobs.prompt_file import read_prompts

    if path is not None:
        return read_prompts(Path(path), model.vocab_size), None
    return certificate_rows(folder, model)
