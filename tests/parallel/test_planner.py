"""What a rank really holds and autograd really keeps, against the planner's prediction."""

from __future__ import annotations

from typing import Any

import pytest

from ring_train.plan import make_memory
from tests.conftest import OnRanks
from tests.parallel.short_runs import FIRST_GENERATION

TOLERANCE = 0.005
"""Of the bytes kept by a forward; buffers of single bytes a token are left out of the formulas."""
WIDE = ["model.hidden_size=160", "model.kv_channels=32", "model.vocab_size=1024"]
LONG = ["train.seq_length=350", "model.max_position_embeddings=4096"]
BF16 = ["train.precision=bf16", "kernels.lightning=torch", "kernels.fused=torch"]
"""Plans in bf16 are made for a GPU, where `auto` is Triton; this is a CPU."""

TRITON = [
    *("kernels.lightning=triton", "kernels.fused=triton", "train.seq_length=70"),
    *("model.num_layers=2", "model.layer_group_size=2", "model.mtp_num_layers=0"),
]
"""In Triton's interpreter."""
FUSED = ["kernels.fused=triton", "train.seq_length=70"]
SEQUENTIAL = "kernels.experts=sequential"
SILU = "model.linear_silu=true"
"""The kernel that splits heads applies it."""


def held(words: list[str]) -> dict[str, int]:
    """Return bytes of this rank: those that are there, and those that were predicted."""
    import torch

    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from tests.parallel.short_runs import SyntheticBatches, short_plan

    plan = short_plan(words)
    with start_runtime(plan) as groups:
        wrapped: Any = build_model(plan, groups.collection)[0]
        model = wrapped.module
        weights = {id(p.untyped_storage()): p for p in model.parameters()}
        pointers = {p.untyped_storage().data_ptr() for p in weights.values()}
        kept: dict[int, Any] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            pointer = tensor.untyped_storage().data_ptr()
            if pointer not in pointers:
                kept[pointer] = tensor  # alive, so that no address comes twice
            return tensor

        batch = SyntheticBatches(plan).batch(0, 0, 0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(batch)
        parts = make_memory(plan)[0].parts
        buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
        return {
            "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
            "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
            "kept": sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
            "predicted weights": parts["weights"],
            "predicted gradients": parts["gradients"],
            "predicted kept": parts["activations"] + parts["output head"],
        }


@pytest.mark.parametrize(
    "words",
    [
        *(LONG, [*LONG, *WIDE], [*LONG, *BF16], [*LONG, *WIDE, *BF16]),
        *([*LONG, SEQUENTIAL], [*LONG, *WIDE, *BF16, SEQUENTIAL]),
        *([*LONG, *FIRST_GENERATION], [*FUSED, *FIRST_GENERATION]),
        *(TRITON, [*TRITON, SILU], FUSED, [*FUSED, *WIDE, SEQUENTIAL]),
    ],
    ids=" ".join,
)
def test_one_rank_keeps_what_is_predicted(on_ranks: OnRanks, words: list[str]) -> None:
    found = on_ranks(1, held, words)[0]
    assert found["predicted gradients"] == found["gradients"]
    assert found["predicted weights"] == pytest.approx(found["weights"], rel=0.001)
    assert found["predicted kept"] == pytest.approx(found["kept"], rel=TOLERANCE)


@pytest.mark.parametrize("experts", ["grouped", "sequential"])
@pytest.mark.parametrize("degree", ["expert_model_parallel_size", "expert_tensor_parallel_size"])
def test_ranks_that_share_experts_keep_what_is_predicted(
    degree: str, experts: str, on_ranks: OnRanks
) -> None:
    """On average: tokens are not spread evenly over the ranks of their experts."""
    words = [*LONG, f"parallel.{degree}=2", f"kernels.experts={experts}"]
    ranks = on_ranks(2, held, words)
    predicted = ranks[0]["predicted kept"]
    assert predicted == pytest.approx(sum(r["kept"] for r in ranks) / 2, rel=TOLERANCE)
