"""The stream of a phased run: the same whatever the layout, counted, and refused where too long."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ring_train.config import BatchRampConfig, Config, DomainConfig, Packing, PhaseConfig
from ring_train.data import index
from ring_train.data.errors import DataError
from ring_train.data.ledger import count_tokens, ledger_array, make_ledger
from ring_train.data.loader import Batches, build_batches
from ring_train.data.mixture import check_same_samples
from ring_train.plan import Plan, make_plan
from tests.unit.data.shard_files import make_data_plan


def phases() -> dict[str, PhaseConfig]:
    """Return three phases that differ in mixture, row length, batch size and how they are given."""
    ramp = BatchRampConfig(start=4, increment=4, steps=2)
    return {
        "one": PhaseConfig(num_steps=3, weights={"code": 0.68, "math": 0.32}),
        "two": PhaseConfig(num_steps=6, batch_ramp=ramp, global_batch_size=12),
        "long": PhaseConfig(tokens={"code": 64 * 12}, seq_length=64, global_batch_size=4),
    }


def phased_plan(
    folder: Path,
    changed: dict[str, PhaseConfig] | None = None,
    *,
    world_size: int = 1,
    micro: int = 2,
) -> Plan:
    """Return the plan of a run through `phases()`, with some of them replaced."""
    config: Config = make_data_plan(folder).config
    config.phases = {**phases(), **(changed or {})}
    for one in config.phases.values():
        one.micro_batch_size = micro
    config.train.num_steps = 12
    return make_plan(config, world_size)


def step_rows(plan: Plan, batches: Batches, step: int) -> torch.Tensor:
    """Return the rows of a step in global order."""
    at = plan.at(step)
    parts = [
        batches.batch(step, micro, rank).tokens.view(-1, at.phase.batch.seq_length)
        for micro in range(at.num_micro_batches)
        for rank in range(plan.mesh.dp)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize(("world_size", "micro"), [(2, 2), (4, 1), (1, 4), (2, 1)])
def test_the_stream_does_not_depend_on_ranks_and_micro_batches(
    tmp_path: Path, world_size: int, micro: int
) -> None:
    plans = [phased_plan(tmp_path), phased_plan(tmp_path, world_size=world_size, micro=micro)]
    streams = [build_batches(plan) for plan in plans]
    sizes = set()
    for step in reversed(range(12)):  # in any order, from a fresh process
        rows = [step_rows(p, b, step) for p, b in zip(plans, streams, strict=True)]
        assert torch.equal(*rows)
        sizes.add(tuple(rows[0].shape))
    assert sizes == {(8, 32), (4, 32), (12, 32), (4, 64)}


@pytest.mark.parametrize("packing", [Packing.contiguous, Packing.best_fit])
def test_kept_files_change_nothing(
    tmp_path: Path, packing: Packing, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = phased_plan(tmp_path, {"long": PhaseConfig(tokens={"code": 32 * 24})})
    plan.config.data.packing = packing
    expected = [step_rows(plan, build_batches(plan), step) for step in range(12)]
    assert not (tmp_path / "index").exists()
    monkeypatch.setattr(index, "MIN_WORK", 0)
    for _ in range(2):  # built, then mapped
        batches = build_batches(plan)
        for step in range(12):
            assert torch.equal(step_rows(plan, batches, step), expected[step])
    assert {path.name.split("-")[0] for path in (tmp_path / "index").glob("*.npy")} >= (
        {"order", "starts", "blend"}
        if packing is Packing.contiguous
        else {"pack_documents", "rows", "blend"}
    )


def test_a_domain_goes_on_in_the_next_phase_where_it_stopped(tmp_path: Path) -> None:
    plan = phased_plan(tmp_path)
    mixture = build_batches(plan).mixture
    stream = mixture.streams["code"]
    total = sum(phase.num_samples for phase in plan.phases)
    rows = [mixture.row(sample) for sample in range(total)]
    read = np.concatenate([row.tokens[:-1] for row in rows if row.domain == 0])
    pieces = stream.pieces(0, len(read))
    firsts = stream.shard.begins(pieces.documents) + pieces.begins
    spans = zip(firsts.tolist(), (firsts + pieces.ends - pieces.begins).tolist(), strict=True)
    expected = np.concatenate([stream.shard.tokens[a:b] for a, b in spans])[: len(read)]
    assert np.array_equal(read, expected)


@pytest.mark.parametrize("packing", list(Packing))
def test_what_is_read_is_what_the_plan_says_after_every_step(
    tmp_path: Path, packing: Packing
) -> None:
    plan = phased_plan(tmp_path, {"long": PhaseConfig(tokens={"code": 32 * 24})})
    plan.config.data.packing = packing
    for domain in plan.config.data.domains.values():
        domain.max_document_tokens = 32 if packing is Packing.whole else None
    batches = build_batches(plan)
    read = np.zeros((3, 2), dtype=np.int64)
    for step in range(12):
        at = plan.at(step)
        micro_batches = [batches.batch(step, micro, 0) for micro in range(at.num_micro_batches)]
        read[plan.phases.index(at.phase)] += count_tokens(micro_batches, 2)
        end = at.first_sample + at.global_batch_size
        assert np.array_equal(batches.mixture.tokens_before(end), read)
    full = sum(phase.num_tokens for phase in plan.phases)
    assert (read.sum() == full) == (packing is Packing.contiguous)
    ledger = make_ledger(plan.phases, batches.domains, read)
    assert np.array_equal(ledger_array(plan.phases, batches.domains, ledger), read)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.integers(0, 50), min_size=2, max_size=2).filter(any), st.integers(1, 200))
def test_budgets_are_met_to_the_row_and_each_prefix_is_within_one(
    tmp_path: Path, rows: list[int], prefix: int
) -> None:
    code, math = (4 * count for count in rows)
    budget = PhaseConfig(tokens={"code": 32 * code, "math": 32 * math}, global_batch_size=4)
    config = make_data_plan(tmp_path).config
    config.phases = {"only": budget}
    config.train.num_steps = (code + math) // 4
    plan = make_plan(config, 1)
    mixture = build_batches(plan).mixture
    total = code + math
    assert mixture.rows_before(total)[0].tolist() == [code, math]
    n = min(prefix, total)
    for count, share in zip(mixture.rows_before(n)[0], (code, math), strict=True):
        assert abs(count * total - n * share) < total


def test_a_domain_read_too_often_or_too_far_is_refused(tmp_path: Path) -> None:
    plan = phased_plan(tmp_path)
    epochs = build_batches(plan).mixture.epochs()
    plan.config.data.domains["code"].max_epochs = epochs["code"]
    build_batches(plan)
    plan.config.data.domains["code"].max_epochs = epochs["code"] - 1e-9
    plan.config.data.domains["math"].max_tokens = 100
    with pytest.raises(DataError) as caught:
        build_batches(plan)
    assert "data.domains.code.max_epochs=" in str(caught.value)
    assert f"read the domain {epochs['code']:.3f} times" in str(caught.value)
    assert "data.domains.math.max_tokens=100" in str(caught.value)


def test_a_selection_without_documents_is_refused(tmp_path: Path) -> None:
    plan = phased_plan(tmp_path)
    plan.config.data.domains["math"].min_document_tokens = 1000
    with pytest.raises(DataError, match=r"data.domains.math: none of 60 documents .*longest has"):
        build_batches(plan)


def test_what_has_been_read_may_not_change_and_what_lies_ahead_may(tmp_path: Path) -> None:
    def record(**phase: PhaseConfig) -> list[dict[str, Any]]:
        return build_batches(phased_plan(tmp_path, phase)).mixture_record()

    before = json.loads(json.dumps(record()))  # as a checkpoint holds it
    read_all, into_long = 24 + 48, 24 + 49
    check_same_samples(before, before, 10**6)
    other_long = PhaseConfig(tokens={"math": 64 * 12}, seq_length=64, global_batch_size=4)
    check_same_samples(before, record(long=other_long), read_all)
    with pytest.raises(DataError, match=r"phase 'long'.*domains.code.share=None \(was 1\)"):
        check_same_samples(before, record(long=other_long), into_long)
    other_one = PhaseConfig(num_steps=3, weights={"code": 0.5, "math": 0.5})
    check_same_samples(before, record(one=other_one), 0)
    with pytest.raises(DataError, match=r"has read 8 samples.*'one'.*code.share=1 \(was 17\)"):
        check_same_samples(before, record(one=other_one), 8)
    for num_samples, accepted in ((800, True), (16, True), (15, False), (8, False)):
        resized = [{**before[0], "num_samples": num_samples}, *before[1:]]
        if accepted:
            check_same_samples(before, resized, 16)
        else:
            with pytest.raises(DataError, match=rf"samples read={num_samples} \(was 16\)"):
                check_same_samples(before, resized, 16)
    with pytest.raises(DataError, match=r"'one'.*name=None \(was one\)"):
        check_same_samples(before, [], 8)
    reseeded = [{**phase, "seed": 99} for phase in before]
    with pytest.raises(DataError, match=r"seed=99 \(was 1234\)"):
        check_same_samples(before, reseeded, 8)


def test_a_ramp_may_go_on_differently_and_a_later_domain_may_be_new(tmp_path: Path) -> None:
    before = build_batches(phased_plan(tmp_path)).mixture_record()
    ramp = BatchRampConfig(start=4, increment=4, steps=2)
    longer = PhaseConfig(num_steps=3, batch_ramp=ramp, global_batch_size=8)
    plan = phased_plan(tmp_path)
    plan.config.phases = {**plan.config.phases, "two": longer, "long": PhaseConfig(num_steps=6)}
    plan.config.data.domains["new"] = DomainConfig(path=str(tmp_path / "math"), weight=0.0)
    plan.config.phases["long"].weights = {"new": 1.0}
    now = build_batches(make_plan(plan.config, 1)).mixture_record()
    check_same_samples(before, now, 24 + 8 + 8)  # two steps of 4 rows and one of 8
    with pytest.raises(DataError, match=r"batch sizes=.*samples read|samples read"):
        check_same_samples(before, now, 24 + 48)


def test_a_domain_too_short_for_a_row_of_the_phase_that_reads_it_is_refused(tmp_path: Path) -> None:
    plan = phased_plan(tmp_path)
    plan.config.data.domains["code"].max_document_tokens = 3
    with pytest.raises(DataError, match=r"data.domains.code: .* fewer than phases.long.seq_length"):
        build_batches(plan)
