"""A token mixer that ring_train has never heard of trains, saves and resumes at PP2.

It is defined here and entered in the registry; nothing under ring_train/ knows it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ring_train.config import ModelConfig, compose
from ring_train.plan import Plan, make_plan
from ring_train.plan.mixers import TOKEN_MIXERS, Mixer
from tests.conftest import OnRanks
from tests.parallel.short_runs import PP2, SHORT_RUN
from tests.parallel.test_resume import run_until, state_at
from tests.parallel.test_training_layouts import (
    FIGURES,
    LOSS_TOLERANCE,
    SMALLEST_MARGIN,
    train,
)

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from ring_train.model.documents import Documents

NUM_TAPS = 4
NUM_STEPS = 6
MIXERS = ["model.token_mixers=[moving_average,gqa,lightning,moving_average]"]


def num_parameters(model: ModelConfig) -> int:
    return NUM_TAPS * model.hidden_size + model.hidden_size**2 + model.hidden_size


def flops_per_token(model: ModelConfig, seq_length: int) -> float:
    return 2 * num_parameters(model)


def moving_average_spec(plan: Plan, config: TransformerConfig) -> ModuleSpec:
    """Return the spec; the module is made here, where torch may be imported."""
    import torch
    from megatron.core.transformer.spec_utils import ModuleSpec

    class MovingAverage(torch.nn.Module):
        """Each channel is a weighted sum of its last NUM_TAPS values in the document."""

        def __init__(self, config: TransformerConfig, **unused: Any) -> None:
            super().__init__()
            h, dtype = config.hidden_size, config.params_dtype
            self.taps = torch.nn.Parameter(torch.empty(NUM_TAPS, h, dtype=dtype))
            self.projection = torch.nn.Parameter(torch.empty(h, h, dtype=dtype))
            self.scale = torch.nn.Parameter(torch.empty(h, dtype=dtype))

        def forward(
            self,
            hidden_states: torch.Tensor,
            packed_seq_params: Documents,
            **unused: Any,
        ) -> tuple[torch.Tensor, None]:
            """Return (output [t, 1, h], no bias)."""
            ages = [torch.arange(length) for length in packed_seq_params.lengths]
            age = torch.cat(ages)[:, None, None]  # [t, 1, 1], tokens before in the document
            mixed = torch.zeros_like(hidden_states)
            for distance, tap in enumerate(self.taps):
                mixed += tap * (hidden_states.roll(distance, 0) * (age >= distance))
            return (self.scale * mixed) @ self.projection.T, None

    return ModuleSpec(module=MovingAverage)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry has one more entry, here and in the forked ranks."""
    mixer = Mixer(
        num_parameters=num_parameters,
        num_active_parameters=num_parameters,
        flops_per_token=flops_per_token,
        spec=f"{__name__}:moving_average_spec",
    )
    monkeypatch.setitem(TOKEN_MIXERS, "moving_average", mixer)


def test_losses_at_pp2_match_one_rank(on_ranks: OnRanks) -> None:
    reference = on_ranks(1, train, MIXERS, NUM_STEPS)[0]
    assert min(reference["margin"]) > SMALLEST_MARGIN
    for figures in on_ranks(2, train, [*MIXERS, *PP2], NUM_STEPS):
        for key in FIGURES:
            assert figures[key] == pytest.approx(reference[key], abs=LOSS_TOLERANCE, rel=0), key
    others = on_ranks(1, train, [], 1)[0]
    assert abs(others["lm"][0] - reference["lm"][0]) > 100 * LOSS_TOLERANCE


def test_resume_at_pp2_is_bit_equal(on_ranks: OnRanks, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    on_ranks(2, run_until, whole, 3, [*MIXERS, *PP2])
    on_ranks(2, run_until, cut, 1, [*MIXERS, *PP2])
    on_ranks(2, run_until, cut, 3, [*MIXERS, *PP2])
    assert state_at(cut, 3) == state_at(whole, 3)


def count_parameters() -> int:
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from tests.parallel.short_runs import short_plan, weights_by_name

    plan = short_plan(MIXERS)
    with start_runtime(plan) as groups:
        weights = weights_by_name(build_model(plan, groups.collection))
    averages = [name for name in weights if name.endswith("self_attention.taps")]
    assert averages == [f"decoder.layers.{i}.self_attention.taps" for i in (0, 3)]
    return sum(weight.numel() for weight in weights.values())


def test_the_plan_counts_its_parameters(on_ranks: OnRanks) -> None:
    config = compose("pretrain", [*SHORT_RUN, *MIXERS])
    cost = make_plan(config, 1).cost
    assert on_ranks(1, count_parameters) == [cost.num_parameters + cost.num_mtp_parameters]
    model = replace(config.model, token_mixers=None)
    assert make_plan(replace(config, model=model), 1).cost.num_parameters != cost.num_parameters


def start_generation() -> str:
    from ring_train.errors import UserError
    from ring_train.generation import Generator
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from tests.parallel.short_runs import short_plan

    plan = short_plan(MIXERS)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        with pytest.raises(UserError, match="max_batch_size=0 leaves room for nothing; set 1"):
            Generator(plan, model, groups, max_batch_size=0, max_prefill_tokens=1)
        with pytest.raises(UserError) as caught:
            Generator(plan, model, groups, max_batch_size=1, max_prefill_tokens=1)
        return str(caught.value)


def test_generation_refuses_a_mixer_without_a_cache(on_ranks: OnRanks) -> None:
    (message,) = on_ranks(1, start_generation)
    assert message.startswith("layer 1 mixes tokens by MovingAverage, which has no build_cache")
