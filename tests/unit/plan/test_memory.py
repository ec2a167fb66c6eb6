"""Predicted memory adds up, falls where something is saved, and refuses what does not fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ring_train.config import compose
from ring_train.plan import PlanError, footprint, make_memory, make_plan, make_timing, search
from ring_train.plan.memory import in_flight, rank_rows
from ring_train.plan.simulation import pass_order, pipeline_seconds
from tests.unit.plan.configs import tiny

FULL = [
    "parallel.recompute_granularity=full",
    "parallel.recompute_method=uniform",
    "parallel.recompute_num_layers=1",
]
SHARDED = "parallel.use_distributed_optimizer=true"


def peak(world_size: int, *words: str) -> dict[str, int]:
    ranks = make_memory(make_plan(tiny(*words), world_size))
    return max(ranks, key=lambda rank: rank.total).parts


def test_recomputation_keeps_fewer_activations() -> None:
    modules = "parallel.recompute_modules=[core_attn,moe]"
    selective = ["parallel.recompute_granularity=selective", modules]
    sizes = [peak(1, *words)["activations"] for words in ([], selective, FULL)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_distributed_optimizer_is_shared_by_the_data_parallel_ranks() -> None:
    assert peak(4)["optimizer"] / 4 == pytest.approx(peak(4, SHARDED)["optimizer"], rel=0.001)


@pytest.mark.parametrize("words", [[], ["parallel=ep2"], ["parallel=pp2"], ["parallel=tp2"]])
def test_all_ranks_together_hold_the_whole_state(words: list[str]) -> None:
    plan = make_plan(tiny(*words), 2)
    held = sum(
        rank.parts["weights"] + rank.parts["gradients"] + rank.parts["optimizer"]
        for rank in make_memory(plan)
    )
    assert held * 2 // plan.mesh.pp >= sum(plan.state_bytes)


HEAD_SIZES = ["model.vocab_size=32768", "train.seq_length=4096", "model.mtp_num_layers=1"]


def test_chunks_of_logits_keep_no_logits() -> None:
    chunked, full = (
        peak(1, *HEAD_SIZES, f"kernels.cross_entropy={kind}") for kind in ("chunked", "full")
    )
    tokens = make_plan(tiny(*HEAD_SIZES), 1).batch.tokens_per_micro_batch
    logits = tokens * 32768 * 4
    hidden = tokens * 64 * 4
    # Two heads: softmax, masks and hidden states of each against hidden states, label, log-sum-exp.
    saved = full["output head"] - chunked["output head"]
    assert saved == 2 * (logits + 17 * tokens - 12 * tokens)
    # The gradient of the softmax and of the logits, or a chunk of 1024 tokens, twice as torch does.
    at_work = 2 * logits - (2 * logits * 1024 // tokens + 2 * hidden + 64 * 4 * min(tokens, 5792))
    assert full["one layer at work"] - chunked["one layer at work"] == at_work


def test_a_larger_chunk_needs_more_and_a_row_within_it_is_not_cut() -> None:
    words = [*HEAD_SIZES, "kernels.cross_entropy_chunk_tokens"]
    sizes = [peak(1, *words[:-1], f"{words[-1]}={n}")["one layer at work"] for n in (256, 1024)]
    assert sizes[0] < sizes[1]
    whole = peak(1, *words[:-1], f"{words[-1]}=1000000")
    assert whole == peak(1, *words[:-1], "kernels.cross_entropy=full")


def test_forming_logits_again_takes_the_time_of_one_more_product() -> None:
    seconds = []
    for kind in ("chunked", "full"):
        words = [*HEAD_SIZES, "machine=h100", "machine.memory_gb_per_s=1e12"]
        plan = make_plan(tiny(*words, f"kernels.cross_entropy={kind}"), 1)
        seconds.append(make_timing(plan).parts["output head"])
    # Of two heads and the projection of one MTP depth, 3 products each: one more for each head.
    vocab, h = 32768, 64
    matrices = 2 * vocab + 2 * h
    assert seconds[0] / seconds[1] == pytest.approx(1 + 2 * vocab / (3 * matrices), rel=1e-3)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 6))
def test_a_simulated_rank_keeps_what_is_said_to_be_in_flight(pp: int, vpp: int, m: int) -> None:
    if vpp > 1 and pp == 1:
        return
    m *= pp
    for rank in range(pp):
        alive = most = 0
        for _, _, is_forward in pass_order(pp, vpp, rank, m):
            alive += 1 if is_forward else -1
            most = max(most, alive)
        assert sum(in_flight(pp, vpp, rank, m)) == most


@given(st.integers(1, 5), st.integers(1, 12))
def test_even_stages_have_the_bubble_of_the_formula(pp: int, m: int) -> None:
    seconds = pipeline_seconds([1.0] * pp, [2.0] * pp, pp, m)
    assert seconds == pytest.approx(3.0 * (m + pp - 1))


def test_a_plan_that_does_not_fit_is_refused_with_ways_out() -> None:
    with pytest.raises(
        PlanError, match=r"machine=h100 has 79.1 GiB a device.* recompute .*plan_search"
    ):
        make_plan(compose("pretrain", ["model=ring_flash_linear_2_0", "machine=h100"]), 8)


def test_wrong_figures_of_a_machine_are_refused() -> None:
    with pytest.raises(PlanError, match=r"machine.gemm_tflops=0.0 is not positive"):
        make_plan(tiny("machine=h100", "machine.gemm_tflops=0"), 1)
    with pytest.raises(PlanError, match=r"expert_imbalance=0.5 is not 1 or more"):
        make_plan(tiny("machine=h100", "machine.expert_imbalance=0.5"), 1)


def test_every_layout_of_a_search_is_a_legal_plan_and_none_is_faster() -> None:
    words = ["model=tiny", "world_size=4", "machine=h100", "optim=short", "train=cpu"]
    config = compose("plan_search", [*words, "train.eval_interval_steps=0"])
    some, every = search(config, 4, 3), search(config, 4, 10_000)
    assert len(every.layouts) == every.num_fitting
    steps = [layout.timing.step_s for layout in every.layouts]
    assert steps == sorted(steps)
    assert [layout.timing.step_s for layout in some.layouts] == steps[:3]
    for layout in some.layouts:
        given_words = [word for word in words if not word.startswith("world_size")]
        again = [*given_words, "train.eval_interval_steps=0", *layout.overrides]
        plan = make_plan(compose("pretrain", again), 4)
        assert make_timing(plan).step_s == pytest.approx(layout.timing.step_s)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_chunks_of_states_are_those_of_the_kernels(precision: str) -> None:
    """The plan must not import torch, so it knows their sizes by itself."""
    import torch

    from ring_train.ops.kernels.lightning_states import chunk_size_for
    from ring_train.ops.lightning_chunked import CHUNK_SIZE

    x = torch.zeros(1, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    for kernel, chunk in (("torch", CHUNK_SIZE), ("triton", chunk_size_for(x))):
        words = [f"train.precision={precision}", f"kernels.lightning={kernel}"]
        plan = make_plan(tiny(*words), 1)
        rows = rank_rows(plan.config, plan.mesh, plan.batch)
        assert rows.state_chunk == chunk
        assert rows.state_element_bytes == (x.element_size() if kernel == "triton" else 4)


@given(chunks=st.integers(1, 2000), programs=st.integers(1, 300))
def test_segments_of_states_are_those_of_the_kernels(chunks: int, programs: int) -> None:
    from ring_train.ops.kernels import lightning_states

    assert footprint.STATE_PROGRAMS == lightning_states.PROGRAMS
    assert footprint.STATE_COLUMNS == lightning_states.MAX_COLUMNS
    segments, _ = lightning_states._segments(chunks, programs)
    counted = footprint._segments(chunks, programs, footprint.STATE_PROGRAMS)
    assert counted == (segments if segments > 1 else 0)
