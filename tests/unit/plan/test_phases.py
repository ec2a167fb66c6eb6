"""Phases: which step reads which samples, in which sizes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_train.config import BatchRampConfig, Config, DomainConfig, Packing, PhaseConfig
from ring_train.plan import Plan, PlanError, make_plan, model_at
from ring_train.plan.phases import integer_shares
from tests.unit.plan.configs import tiny

DOMAINS = ("code", "math", "prose")


def phased(phases: dict[str, PhaseConfig], *, num_steps: int | None = None) -> Config:
    """Return a run of rows of 32 tokens, 8 a step, over three domains."""
    config = tiny("train.seq_length=32", "train.global_batch_size=8", "train.micro_batch_size=2")
    config.data.domains = {name: DomainConfig(path=name) for name in DOMAINS}
    config.phases = phases
    config.optim.lr_warmup_steps = config.optim.wsd_decay_steps = 0
    if num_steps is not None:
        config.train.num_steps = num_steps
    return config


def samples_of(plan: Plan) -> list[tuple[int, int]]:
    """Return (first sample, samples) of every step."""
    steps = [plan.at(step) for step in range(plan.config.train.num_steps)]
    return [(step.first_sample, step.global_batch_size) for step in steps]


def test_a_run_without_phases_is_one_phase() -> None:
    plan = make_plan(phased({}, num_steps=5), 1)
    assert samples_of(plan) == [(0, 8), (8, 8), (16, 8), (24, 8), (32, 8)]
    assert [phase.name for phase in plan.phases] == ["train"]
    assert plan.phases[0].shares == {"code": 1, "math": 1, "prose": 1}
    assert plan.total_tokens == 5 * 8 * 32


def test_phases_follow_each_other_in_their_own_sizes() -> None:
    phases = {
        "one": PhaseConfig(num_steps=2, weights={"code": 0.68, "math": 0.32}),
        "two": PhaseConfig(
            tokens={"math": 64 * 12, "prose": 64 * 4},
            seq_length=64,
            global_batch_size=4,
            micro_batch_size=1,
            rotary_base=50_000.0,
            moe_router_bias_update_rate=0.0,
        ),
    }
    plan = make_plan(phased(phases, num_steps=6), 2)
    assert samples_of(plan) == [(0, 8), (8, 8), (16, 4), (20, 4), (24, 4), (28, 4)]
    assert plan.phases[0].shares == {"code": 17, "math": 8, "prose": 0}
    assert plan.phases[1].shares == {"code": 0, "math": 3, "prose": 1}
    assert plan.phases[1].batch.seq_length == 64
    assert plan.at(2).num_micro_batches == 2
    assert plan.total_tokens == 16 * 32 + 16 * 64
    assert model_at(plan, 2) == plan.config.model
    assert model_at(plan, 3).rotary_base == 50_000
    assert model_at(plan, 3).moe_router_bias_update_rate == 0


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 30))
def test_a_ramp_gives_every_sample_to_one_step(
    start: int, increment: int, steps: int, num_steps: int
) -> None:
    ramp = BatchRampConfig(start=2 * start, increment=2 * increment, steps=steps)
    full = 2 * start + 6 * increment
    phases = {"one": PhaseConfig(num_steps=num_steps, batch_ramp=ramp, global_batch_size=full)}
    plan = make_plan(phased(phases, num_steps=num_steps), 1)
    found = samples_of(plan)
    sizes = [2 * start + 2 * increment * min(3, step // steps) for step in range(num_steps)]
    assert [size for _, size in found] == sizes
    assert [first for first, _ in found] == [sum(sizes[:step]) for step in range(num_steps)]
    assert plan.phases[0].num_samples == sum(sizes)
    micro = [plan.at(step).num_micro_batches for step in range(num_steps)]
    assert micro == [size // 2 for size in sizes]


def test_a_token_budget_with_a_ramp_has_the_steps_that_spend_it() -> None:
    ramp = BatchRampConfig(start=2, increment=2, steps=3)
    rows = 3 * 2 + 3 * 4 + 3 * 6 + 5 * 8
    phases = {"one": PhaseConfig(tokens={"code": rows * 32}, batch_ramp=ramp)}
    plan = make_plan(phased(phases, num_steps=14), 1)
    assert plan.phases[0].num_samples == rows
    assert sum(size for _, size in samples_of(plan)) == rows


@pytest.mark.parametrize(
    ("phase", "num_steps", "message"),
    [
        (PhaseConfig(), 5, r"phases.x: nothing gives its length; add num_steps"),
        (PhaseConfig(tokens={"code": 256}, num_steps=1), 1, "both give its length"),
        (PhaseConfig(tokens={"code": 250}), 1, r"tokens.code=250 .*write 224 or 256"),
        (PhaseConfig(tokens={"cod": 256}), 1, r"tokens.cod=256: no such domain.*code"),
        (PhaseConfig(tokens={"code": 9 * 32}), 1, r"9 rows of 32 tokens, 1 more .*take 1 rows"),
        (PhaseConfig(num_steps=3), 5, r"train.num_steps=5 .*set train.num_steps=3"),
        (PhaseConfig(num_steps=3, weights={"code": -1.0}), 3, r"weights.code=-1.0 is not 0"),
        (PhaseConfig(num_steps=3, weights={"code": 0.0}), 3, r"weights are all 0"),
        (PhaseConfig(num_steps=3, global_batch_size=3), 3, r"phases.x.global_batch_size=3 is not"),
        (PhaseConfig(num_steps=3, seq_length=10**9), 3, r"phases.x.seq_length=.*exceeds"),
        (PhaseConfig(num_steps=-3), 3, r"phases.x.num_steps=-3 is not positive"),
        (PhaseConfig(num_steps=3, rotary_base=float("nan")), 3, r"rotary_base=nan is not above 1"),
        (PhaseConfig(num_steps=3, rotary_scaling_factor=float("inf")), 3, r"=inf is not 1 or more"),
        (PhaseConfig(num_steps=3, moe_router_bias_update_rate=-1.0), 3, r"=-1.0 is not 0 or more"),
        (PhaseConfig(num_steps=3, seq_length=0), 3, r"phases.x.seq_length=0 is not positive"),
        (PhaseConfig(num_steps=3, rotary_scaling_factor=4.0), 3, "original_max_position"),
        (PhaseConfig(num_steps=3, rotary_scaling_factor=0.5), 3, r"=0.5 is not 1 or more"),
        (
            PhaseConfig(num_steps=3, batch_ramp=BatchRampConfig(start=3, increment=2, steps=1)),
            *(3, r"batch_ramp.start=3 is not divisible"),
        ),
        (
            PhaseConfig(num_steps=3, batch_ramp=BatchRampConfig(start=2, increment=4, steps=1)),
            *(3, r"do not reach global_batch_size=8"),
        ),
        (
            PhaseConfig(num_steps=3, batch_ramp=BatchRampConfig(start=2, increment=2, steps=0)),
            *(3, r"batch_ramp.steps=0 is not positive"),
        ),
    ],
)
def test_what_is_wrong_with_a_phase_is_said(
    phase: PhaseConfig, num_steps: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(phased({"x": phase}, num_steps=num_steps), 1)


def test_packed_domains_keep_to_one_length() -> None:
    phases = {"a": PhaseConfig(num_steps=1), "b": PhaseConfig(num_steps=1, seq_length=64)}
    config = phased(phases, num_steps=2)
    config.data.packing = Packing.best_fit
    with pytest.raises(PlanError, match=r"data.domains.code for one row length.*\[32, 64\]"):
        make_plan(config, 1)
    config.phases["b"].seq_length = None
    assert make_plan(config, 1).total_tokens == 16 * 32
    config.data.document_isolation = False
    with pytest.raises(PlanError, match=r"data.packing=best_fit pads rows"):
        make_plan(config, 1)


def test_weights_count_as_the_decimals_they_print_as() -> None:
    assert integer_shares([0.35, 0.25, 0.4]) == [7, 5, 8]
    assert integer_shares([68, 32]) == [17, 8]
    assert integer_shares([1e-4, 1.0, 0.0]) == [1, 10_000, 0]
