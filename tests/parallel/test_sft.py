"""Fine-tuning on packed chat rows: equal to unpacked rows, equal under every layout, bounded.

The rows are packed by the loader from shards with a loss mask.
"""

from __future__ import annotations

import itertools
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import OnRanks
from tests.parallel.chat_shards import chat_words
from tests.parallel.short_runs import EP2, PP2, TP2, short_plan

PACKED_TOLERANCE = 1e-6
"""Relative; of the issue. fp32 sums of the same tokens in another order; measured 1e-7."""
LAYOUT_TOLERANCE = 1e-5
"""As in test_training_layouts: sums in another order, through some updates."""
SMALLEST_MARGIN = 1e-5
"""Far above the rounding of a score, so that no layout can flip an expert."""
NUM_STEPS = 5
ROW = ["train.seq_length=64", f"train.num_steps={NUM_STEPS}", "optim.wsd_decay_steps=2", "seed=52"]
"""A seed with routing margins above the rounding of a score, and without a document whose first
q k^T is tiny, which the group norm would blow up (see short_runs)."""
LAYOUTS = {"tp2_sp": TP2, "pp2": PP2, "ep2": EP2, "cp2": ["parallel.context_parallel_size=2"]}
LONG_TOKENS = 32_768
LONG_BYTES = 3 * 2**30
"""What a process may add for a row of that length; 1.4 GiB were measured."""


def losses_of_rows(words: list[str]) -> dict[str, Any]:
    """Return the loss of a packed step and that of its documents, each in a row of its own."""
    from ring_train.data.batch import pack_documents
    from ring_train.data.loader import build_batches
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.scoring import token_losses
    from ring_train.train.step import forward_backward

    plan = short_plan(words)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        batches = build_batches(plan)
        rows = [batches.batch(0, index, 0) for index in range(plan.batch.num_micro_batches)]
        packed = forward_backward(model, rows, groups.collection, num_domains=2, loss_weights=None)
        answers = answer_lengths(batches)
        total, trained, documents, expected = 0.0, 0, 0, 0
        for row in rows:
            starts = row.cu_seqlens.tolist()
            for start, end in itertools.pairwise(starts):
                if row.padding_mask[start]:
                    continue
                alone = pack_documents(
                    [row.tokens[start:end].tolist()], num_mtp=plan.layers.num_mtp
                )
                (found,) = token_losses(model, [alone], groups.collection)
                mask = row.loss_mask[start:end]
                total += float(found[0, mask].double().sum())
                trained += int(mask.sum())
                documents += 1
                expected += answers[tuple(row.tokens[start:end].tolist())]
        return {
            "packed": float(packed.lm_loss),
            "alone": total / trained,
            "trained": [int(packed.domain_tokens.sum()), trained, expected],
            "documents": documents,
            "rows": sum(len(row.tokens) for row in rows) // plan.batch.seq_length,
        }


def answer_lengths(batches: Any) -> dict[tuple[int, ...], int]:
    """Return {document: its trained tokens}, as the shards say."""
    found = {}
    for shard in batches.shards.values():
        for start, length in zip(
            shard.begins(np.arange(shard.num_documents)), shard.lengths, strict=True
        ):
            part = slice(start, start + length)
            found[tuple(shard.tokens[part].tolist())] = int(shard.loss_mask[part].sum())
    return found


def test_a_packed_step_has_the_loss_of_its_documents_alone(
    on_ranks: OnRanks, tmp_path: Path
) -> None:
    (found,) = on_ranks(1, losses_of_rows, [*ROW, *chat_words(tmp_path)])
    assert found["documents"] > 2 * found["rows"], "rows must hold several documents"
    assert len(set(found["trained"])) == 1
    assert found["packed"] == pytest.approx(found["alone"], rel=PACKED_TOLERANCE)


def train(words: list[str]) -> dict[str, Any]:
    """Return losses, gradient norms, trained tokens and expert biases of a short run."""
    from ring_train.data.loader import build_batches
    from ring_train.model.build import build_model
    from ring_train.model.router import routers
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step

    plan = short_plan(words)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        for number, router in enumerate(routers(model)):
            router.track_margin = True
            router.expert_bias += 0.01 * (number + 1)
        before = [router.expert_bias.clone() for router in routers(model)]
        optimizer = build_optimizer(plan, model, groups.collection)
        batches = build_batches(plan)
        found: dict[str, Any] = {"loss": [], "grad_norm": [], "tokens": []}
        for step in range(NUM_STEPS):
            rows = [
                batches.batch(step, index, groups.dp_rank)
                for index in range(plan.at(step).num_micro_batches)
            ]
            result = train_step(
                plan, model, optimizer, rows, groups.collection, step=step, num_domains=2
            )
            found["loss"] += result.sums.domain_means().tolist()
            found["grad_norm"].append(result.grad_norm)
            found["tokens"] += result.sums.domain_tokens.tolist()
        found["margin"] = min((router.margin for router in routers(model)), default=1.0)
        found["frozen"] = all(
            router.expert_bias.equal(bias)
            for router, bias in zip(routers(model), before, strict=True)
        )
        return found


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fine_tuning_equals_one_rank(
    layout: str, on_ranks: OnRanks, tmp_path: Path, references: dict[str, Any]
) -> None:
    words = [*ROW, *chat_words(tmp_path)]
    if not references:
        references.update(on_ranks(1, train, words)[0])
        assert references["margin"] > SMALLEST_MARGIN
        assert references["loss"][-1] < references["loss"][1], "the run must learn something"
    for found in on_ranks(2, train, [*words, *LAYOUTS[layout]]):
        assert found["frozen"]
        assert found["tokens"] == references["tokens"]
        for key in ("loss", "grad_norm"):
            assert found[key] == pytest.approx(references[key], abs=LAYOUT_TOLERANCE, rel=0), key


def added_memory(num_tokens: int) -> int:
    """Return by how many bytes a training step on one document of that length adds to the peak."""
    import torch

    from ring_train.data.batch import pack_documents
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step

    words = ["train.micro_batch_size=1", "train.global_batch_size=1"]
    words += [f"train.seq_length={num_tokens}", f"model.max_position_embeddings={num_tokens}"]
    words += ["model.layer_group_size=4", "model.mtp_num_layers=0"]
    plan = short_plan(words)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        ids = torch.randint(0, 500, (num_tokens,), generator=torch.Generator().manual_seed(0))
        row = pack_documents([ids.tolist()], num_mtp=plan.layers.num_mtp)
        before = peak_bytes()
        result = train_step(plan, model, optimizer, [row], groups.collection, step=0, num_domains=1)
        assert result.sums.domain_tokens.tolist() == [num_tokens - 1]
        return peak_bytes() - before


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_sample_of_32k_tokens_trains_in_bounded_memory(on_ranks: OnRanks) -> None:
    (part,) = on_ranks(1, added_memory, LONG_TOKENS // 4)
    (whole,) = on_ranks(1, added_memory, LONG_TOKENS)
    assert whole < LONG_BYTES
    assert whole < 5 * part, "memory is linear in the length"
