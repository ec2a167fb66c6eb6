"""Micro batches of a run."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ring_train.data.errors import DataError
from ring_train.data.loader import Batches, build_batches
from ring_train.plan import Plan
from tests.unit.data.shard_files import EOS, make_data_plan

NUM_STEPS = 6


def rows_of(plan: Plan, batches: Batches, step: int) -> torch.Tensor:
    """Return the rows of a step in global order: [global batch size, s]."""
    dp, size, s = plan.mesh.dp, plan.batch.micro_batch_size, plan.batch.seq_length
    parts = [
        batches.batch(step, micro, rank).tokens.view(size, s)
        for micro in range(plan.batch.num_micro_batches)
        for rank in range(dp)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(2, 2), (4, 1), (1, 8)])
def test_the_stream_does_not_depend_on_ranks_and_micro_batches(
    tmp_path: Path, world_size: int, micro_batch_size: int
) -> None:
    one = make_data_plan(tmp_path)
    changes = {"train.micro_batch_size": micro_batch_size}
    other = make_data_plan(tmp_path, world_size=world_size, **changes)
    assert other.mesh.dp == world_size
    streams = [build_batches(one), build_batches(other)]
    for step in range(NUM_STEPS):
        rows = [rows_of(p, b, step) for p, b in zip((one, other), streams, strict=True)]
        assert torch.equal(*rows)


def test_a_step_is_the_same_in_a_fresh_process_and_any_order(tmp_path: Path) -> None:
    plan = make_data_plan(tmp_path)
    forward = build_batches(plan)
    expected = [rows_of(plan, forward, step) for step in range(NUM_STEPS)]
    resumed = build_batches(plan)
    for step in reversed(range(NUM_STEPS)):
        assert torch.equal(rows_of(plan, resumed, step), expected[step])


def test_domains_are_sorted_by_name_and_mixed_by_weight(tmp_path: Path) -> None:
    plan = make_data_plan(tmp_path)
    batches = build_batches(plan)
    assert batches.domains == ("code", "math")
    counts = np.zeros(2, dtype=int)
    for step in range(12):
        for micro in range(plan.batch.num_micro_batches):
            domains = batches.batch(step, micro, 0).domains.view(2, -1)
            assert bool((domains == domains[:, :1]).all())
            counts += np.bincount(domains[:, 0].numpy(), minlength=2)
    assert counts.tolist() == [32, 64]


def test_the_seed_changes_the_training_stream_only(tmp_path: Path) -> None:
    plans = [make_data_plan(tmp_path, seed=seed) for seed in (1, 2)]
    first, second = (build_batches(plan) for plan in plans)
    assert not torch.equal(first.batch(0, 0, 0).tokens, second.batch(0, 0, 0).tokens)
    pairs = zip(first.validation("code", 0), second.validation("code", 0), strict=True)
    assert all(torch.equal(one.tokens, two.tokens) for one, two in pairs)


def test_validation_batches_repeat_and_ranks_share_the_rows(tmp_path: Path) -> None:
    plan = make_data_plan(tmp_path, world_size=2)
    batches = build_batches(plan)
    by_rank = [batches.validation("math", rank) for rank in range(2)]
    assert [len(part) for part in by_rank] == [2, 2]
    for again, before in zip(batches.validation("math", 1), by_rank[1], strict=True):
        assert torch.equal(again.tokens, before.tokens)
    all_rows = torch.cat([batch.tokens.view(2, -1) for part in by_rank for batch in part])
    assert len({tuple(row.tolist()) for row in all_rows}) == 8
    assert all(int(batch.domains[0]) == 1 for batch in by_rank[0])


def test_validation_pairs_are_the_targets_of_the_validation_loss(tmp_path: Path) -> None:
    batches = build_batches(make_data_plan(tmp_path))
    rows = batches.validation("code", 0)
    targets = torch.cat([batch.labels[batch.loss_mask] for batch in rows])
    sources, paired = batches.validation_pairs("code")
    assert paired.tolist() == targets.tolist()
    assert EOS not in sources
    assert EOS in paired


def test_a_domain_without_held_out_shard_has_no_validation(tmp_path: Path) -> None:
    plan = make_data_plan(tmp_path)
    plan.config.data.domains["code"].valid_path = None
    batches = build_batches(plan)
    assert batches.validation("code", 0) == []
    assert sorted(batches.data_hashes()) == ["code.train", "math.train", "math.valid"]


def test_no_domain_is_refused(tmp_path: Path) -> None:
    plan = make_data_plan(tmp_path)
    plan.config.data.domains = {}
    with pytest.raises(DataError, match=r"data.domains is empty"):
        build_batches(plan)


def test_more_validation_rows_than_held_out_text_are_refused(tmp_path: Path) -> None:
    plan = make_data_plan(tmp_path, **{"train.eval_steps": 1000})
    with pytest.raises(
        DataError, match=r"train.eval_steps=1000 .* = 2000 of phase train; lower eval_steps"
    ):
        build_batches(plan)
