"""The split over stages: every layer once, never worse than the even one, or as given by hand."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_train.plan import PlanError, make_plan
from ring_train.plan.pipeline import balanced_split
from tests.unit.plan.configs import tiny

COSTS = st.lists(st.integers(1, 50), min_size=1, max_size=24)
SMALL_COSTS = st.lists(st.integers(1, 9), min_size=2, max_size=8)
PP2 = "parallel=pp2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"


def stage_costs(counts: list[int], costs: list[int], tail: int) -> list[int]:
    ends = list(itertools.accumulate(counts, initial=0))
    found = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
    found[-1] += tail
    return found


def all_splits(layers: int, stages: int) -> list[list[int]]:
    return [
        list(counts)
        for counts in itertools.product(range(layers + 1), repeat=stages)
        if sum(counts) == layers and all(counts[:-1])
    ]


@settings(deadline=None)
@given(costs=COSTS, tail=st.integers(0, 200), pp=st.integers(1, 6), vpp=st.integers(1, 4))
def test_every_layer_has_one_stage_and_no_split_is_worse_than_the_even_one(
    costs: list[int], tail: int, pp: int, vpp: int
) -> None:
    stages = pp * vpp
    costs += [1] * (stages - 1 - len(costs))
    counts = balanced_split(costs, tail, pp, vpp)
    assert (len(counts), sum(counts)) == (stages, len(costs))
    assert all(counts[:-1])
    if len(costs) % stages == 0:
        even = [len(costs) // stages] * stages
        assert max(stage_costs(counts, costs, tail)) <= max(stage_costs(even, costs, tail))


@settings(deadline=None)
@given(costs=SMALL_COSTS, tail=st.integers(0, 20), pp=st.integers(1, 3))
def test_no_split_has_a_cheaper_busiest_stage_or_is_more_even(
    costs: list[int], tail: int, pp: int
) -> None:
    def key(counts: list[int]) -> tuple[int, int]:
        found = stage_costs(counts, costs, tail)
        return max(found), sum(cost**2 for cost in found)

    best = min(key(counts) for counts in all_splits(len(costs), pp))
    assert key(balanced_split(costs, tail, pp)) == best


@settings(deadline=None)
@given(costs=SMALL_COSTS, tail=st.integers(0, 20))
def test_interleaving_keeps_the_busiest_stage_and_relieves_the_busiest_rank(
    costs: list[int], tail: int
) -> None:
    costs += [1, 1]
    plain, interleaved = balanced_split(costs, tail, 4), balanced_split(costs, tail, 2, 2)
    before, after = stage_costs(plain, costs, tail), stage_costs(interleaved, costs, tail)
    assert max(after) == max(before)
    assert max(sum(after[::2]), sum(after[1::2])) <= max(sum(before[::2]), sum(before[1::2]))


def test_the_rank_with_the_output_layer_has_fewer_layers_in_its_other_chunk() -> None:
    assert balanced_split([2] * 9, 20, 4) == [3, 3, 3, 0]
    first, second, third, last = balanced_split([2] * 9, 20, 2, 2)
    assert (first + third, second, last) == (8, 1, 0)


def test_equal_layers_split_evenly_and_the_rest_goes_to_earlier_stages() -> None:
    assert balanced_split([7] * 12, 0, 4) == [3, 3, 3, 3]
    assert balanced_split([7] * 12, 0, 2, 2) == [3, 3, 3, 3]
    assert balanced_split([7] * 5, 0, 2) == [3, 2]


def test_the_output_layer_and_mtp_count() -> None:
    assert balanced_split([7] * 12, 14, 2) == [7, 5]
    assert balanced_split([1, 1], 9, 2) == [2, 0]
    plan = make_plan(tiny(PP2), 2)
    first, last = plan.pipeline.stage_flops
    assert [len(stage) for stage in plan.pipeline.stages] == [3, 1]
    assert first + last == plan.cost.flops_per_token
    without = make_plan(tiny(PP2, "model.mtp_num_layers=0"), 2)
    assert without.pipeline.stages != plan.pipeline.stages


def test_layers_of_several_chunks_are_numbered_in_order_of_depth() -> None:
    words = [PP2, VPP2, "parallel.pipeline_layers=[1,2,1,0]"]
    plan = make_plan(tiny(*words), 2)
    assert plan.pipeline.stages == ((0,), (1, 2), (3,), ())
    flops = plan.pipeline.stage_flops
    assert plan.pipeline.rank_flops(2) == (flops[0] + flops[2], flops[1] + flops[3])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["parallel.pipeline_layers=[2,2,0]"],
            "parallel.pipeline_layers=[2, 2, 0] names 3 stages, not "
            "parallel.pipeline_model_parallel_size=2 * 1 chunks; give 2 numbers",
        ),
        (["parallel.pipeline_layers=[2,1]"], "adds up to 3, not to model.num_layers=4; give"),
        (["parallel.pipeline_layers=[0,4]"], "leaves a stage without a layer; only the last may"),
        (["parallel.pipeline_layers=[5,-1]"], "leaves a stage without a layer; only the last may"),
        (
            ["parallel.virtual_pipeline_model_parallel_size=4"],
            "model.num_layers=4 does not give a layer to each stage but the last of parallel."
            "pipeline_model_parallel_size=2 * 4 chunks; choose at most 5 stages",
        ),
        (
            [VPP2, "train.global_batch_size=6"],
            "train.global_batch_size=6 makes 3 micro batches of 2 rows, not divisible by parallel."
            "pipeline_model_parallel_size=2, which the interleaved pipeline (virtual_pipeline_"
            "model_parallel_size=2) needs; choose a multiple of 4 rows",
        ),
        (
            [VPP2, "phases={a: {num_steps: 100, batch_ramp: {start: 2, increment: 2, steps: 9}}}"],
            "phases.a.batch_ramp=2 makes 1 micro batches of 2 rows",
        ),
        ([VPP2, "train.eval_steps=3"], "train.eval_steps=3 micro batches are not divisible by"),
        (
            [VPP2, "parallel.pipeline_model_parallel_size=1"],
            "parallel.virtual_pipeline_model_parallel_size=2 interleaves chunks of several",
        ),
        (["model.megatron.num_layers_in_first_pipeline_stage=1"], "belongs to the plan"),
    ],
)
def test_a_split_or_batch_that_cannot_run_is_named(words: list[str], message: str) -> None:
    with pytest.raises(PlanError, match="=") as caught:
        make_plan(tiny(PP2, *words), 2)
    assert any(message in problem for problem in caught.value.problems)
