"""The flex dispatcher with a stand-in for DeepEP, which needs GPUs, and what is said without it.

The stand-in gives megatron's dispatcher what DeepEP's kernels give it - each rank the tokens of its
experts, once a token, with local indices - by gathering everything. The library itself, and its
kernels, have no part in these tests.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import OnRanks, RankError
from tests.parallel.short_runs import EP2, gradients_by_name, relative_errors, short_plan

if TYPE_CHECKING:
    import torch

BASE = ["train.precision=bf16", "train.micro_batch_size=1", *EP2]
FLEX = ["kernels.moe_token_dispatcher_type=flex"]
GRADIENT_TOLERANCE = 3e-6
"""Relative, in fp64 but for the probabilities, which DeepEP takes in fp32: 6e-8, enlarged."""


def dispatch(
    x: torch.Tensor, indices: torch.Tensor, probs: torch.Tensor, experts: int, group: Any, **_: Any
) -> Any:
    """Return (tokens of this rank, their local experts or -1, probs, counts, what goes back)."""
    import torch
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region as gather

    per_rank = experts // group.size()
    local = gather(indices, group=group) - group.rank() * per_rank
    valid = (local >= 0) & (local < per_rank)
    tokens = valid.any(1).nonzero().squeeze(1)
    counts = torch.bincount(local[valid], minlength=per_rank)
    found = torch.where(valid, local, -1)[tokens]
    handle = (tokens, len(local))
    return gather(x, group=group)[tokens], found, gather(probs, group=group)[tokens], counts, handle


def combine(x: torch.Tensor, group: Any, handle: Any, **_: Any) -> Any:
    """Return what the ranks of its experts made of each token, added up."""
    from megatron.core.tensor_parallel import reduce_scatter_to_sequence_parallel_region

    tokens, total = handle
    full = x.new_zeros(total, x.shape[1]).index_add(0, tokens, x)
    return reduce_scatter_to_sequence_parallel_region(full, group=group), None


def gradients(overrides: list[str]) -> dict[str, Any]:
    """Return losses, gradients in fp64 and the calls of what takes DeepEP's place."""
    import torch
    from megatron.core.transformer.moe import token_dispatcher

    from ring_train.config import Precision
    from ring_train.plan import megatron

    megatron.DTYPES[Precision.bf16] = torch.float64
    sys.modules["deep_ep"] = SimpleNamespace(Buffer=None)  # pyrefly: ignore[unsupported-operation]
    stand_ins: Any = token_dispatcher
    calls: list[str] = []

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return call

    stand_ins.fused_dispatch, stand_ins.fused_combine = counted(dispatch), counted(combine)
    stand_ins.set_deepep_num_sms = lambda number: None
    return gradients_by_name([*BASE, *overrides]) | {"calls": calls}


@pytest.mark.parametrize("experts", ["grouped", "sequential"])
def test_gradients_are_those_of_the_other_dispatcher(experts: str, on_ranks: OnRanks) -> None:
    words = [f"kernels.experts={experts}"]
    expected = on_ranks(2, gradients, words)
    for ours, theirs in zip(on_ranks(2, gradients, [*words, *FLEX]), expected, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=GRADIENT_TOLERANCE)
        assert ours["gradients"].keys() == theirs["gradients"].keys()
        errors = relative_errors(ours["gradients"], theirs["gradients"])
        assert not {n: error for n, error in errors.items() if error > GRADIENT_TOLERANCE}
        assert not theirs["calls"]
        assert ours["calls"].count("dispatch") == ours["calls"].count("combine") > 1


def build_only(overrides: list[str]) -> None:
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime

    plan = short_plan(overrides)
    with start_runtime(plan) as groups:
        build_model(plan, groups.collection)


@pytest.mark.parametrize(
    ("backend", "name"), [("deepep", "Buffer"), ("hybridep", "HybridEPBuffer")]
)
def test_a_dispatcher_without_its_library_is_refused(
    backend: str, name: str, on_ranks: OnRanks
) -> None:
    words = [*BASE, *FLEX, f"kernels.moe_flex_dispatcher_backend={backend}"]
    message = rf"{backend} needs deep_ep.{name} of DeepEP.*choose .*type=alltoall"
    with pytest.raises(RankError, match=message):
        on_ranks(2, build_only, words)
