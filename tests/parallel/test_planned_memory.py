"""What the planner predicts of a rank is what the rank really allocates.

Weights, gradients and optimizer state are counted exactly. What autograd keeps for the backward
pass is a formula per mixer: it may differ from the bytes that are kept by KEPT_TOLERANCE.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import DISTRIBUTED_OPTIMIZER, EP2, PP2, TP2, short_plan

KEPT_TOLERANCE = 0.03
"""Of the activations of a rank. Where a piece sees more keys than queries, torch makes a mask of
them on a CPU (not on a GPU) and keeps it; the plan does not count it."""
BF16 = ["train.precision=bf16"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "bf16": (1, BF16),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "ep2": (2, EP2),
    "dp2_sharded": (2, DISTRIBUTED_OPTIMIZER),
    "ep2_sharded_bf16": (2, [*EP2, *DISTRIBUTED_OPTIMIZER, *BF16]),
    "tp2_pp2_sharded": (4, [*TP2, *PP2, *DISTRIBUTED_OPTIMIZER]),
    "etp2": (
        2,
        [*TP2, "parallel.expert_tensor_parallel_size=2"],
    ),
}
TRITON = [
    *("kernels.lightning=triton", "kernels.fused=triton", "model.layer_group_size=2"),
    *("model.num_layers=2", "model.mtp_num_layers=0"),
]
"""In Triton's interpreter."""
WIDE = [
    *("model.hidden_size=128", "model.ffn_hidden_size=256", "model.kv_channels=32"),
    *("train.seq_length=256", "train.micro_batch_size=1", "train.global_batch_size=1"),
]
"""Sizes at which small constants do not matter; one micro batch, so that one is kept."""


def allocated(words: list[str]) -> dict[str, tuple[int, int]]:
    """Return {part: (bytes of this rank, predicted bytes)} after one step."""
    from ring_train.model.build import build_model
    from ring_train.plan import make_memory
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import build_optimizer
    from ring_train.train.step import train_step
    from tests.parallel.streams import make_micro_batches

    plan = short_plan(words)
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        optimizer = build_optimizer(plan, model, groups.collection)
        rows = make_micro_batches(plan, 0, groups.dp_rank)
        train_step(plan, model, optimizer, rows, groups.collection, step=0, num_domains=1)
        predicted = make_memory(plan)[groups.pp_rank].parts
        chunks: list[Any] = [*model]
        parameters = {id(p): p for chunk in chunks for p in chunk.parameters()}.values()
        biases = [b for chunk in chunks for name, b in chunk.named_buffers() if "bias" in name]
        buffers = [b for c in chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
        return {
            "weights": (sum(x.nbytes for x in (*parameters, *biases)), predicted["weights"]),
            "gradients": (sum(b.grad_data.nbytes for b in buffers), predicted["gradients"]),
            "optimizer": (_state_bytes(optimizer), predicted["optimizer"]),
        }


def _state_bytes(optimizer: Any) -> int:
    """Return the bytes of moments, and of fp32 copies that are no parameters of the model."""
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    found: dict[int, Any] = {}
    for part in parts:
        if part.is_stub_optimizer:
            continue
        for main, state in part.optimizer.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                found[id(state[name])] = state[name]
            masters = getattr(part, "shard_fp32_from_float16_groups", None) or getattr(
                part, "fp32_from_float16_groups", []
            )
            if any(main is master for group in masters for master in group):
                found[id(main)] = main
    return sum(tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_gradients_and_optimizer_are_those_of_the_plan(
    layout: str, on_ranks: OnRanks
) -> None:
    num_ranks, words = LAYOUTS[layout]
    for rank, parts in enumerate(on_ranks(num_ranks, allocated, words)):
        for name, (really, predicted) in parts.items():
            # Shards of the distributed optimizer end where buckets do, which are padded.
            padding = 0.02 if "sharded" in layout and name != "weights" else 0.0
            assert really == pytest.approx(predicted, rel=padding), f"rank {rank}, {name}"


def kept(words: list[str]) -> tuple[int, int]:
    """Return (bytes that autograd keeps of a forward, predicted bytes); parameters do not count."""
    import torch

    from ring_train.model.build import build_model
    from ring_train.plan import make_memory
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import attach_schedule_callbacks
    from ring_train.train.step import forward_backward
    from tests.parallel.streams import make_micro_batches

    plan = short_plan([*WIDE, *words])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        attach_schedule_callbacks(model, None, groups.collection)
        chunks: list[Any] = [*model]
        owned = {x.untyped_storage().data_ptr() for c in chunks for x in c.parameters()}
        owned |= {
            b.param_data.untyped_storage().data_ptr()
            for c in chunks
            for b in (*c.buffers, *c.expert_parallel_buffers)
            if b.param_data is not None
        }
        found: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        depths = plan.layers.num_mtp
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            forward_backward(
                model,
                make_micro_batches(plan, 0, groups.dp_rank),
                groups.collection,
                num_domains=1,
                loss_weights=[1.0, *[0.1] * depths],
            )
        parts = make_memory(plan)[groups.pp_rank].parts
        return sum(found.values()), parts["activations"] + parts["output head"]


@pytest.mark.parametrize(
    ("num_ranks", "words"),
    [
        (1, []),
        (1, ["model.layer_group_size=1"]),
        (1, ["model.mtp_num_layers=0"]),
        (2, TP2),
        (2, [*TP2, "kernels.cross_entropy_chunk_tokens=64", "model.vocab_size=4096"]),
        (2, ["parallel.context_parallel_size=2"]),
        (2, ["parallel.context_parallel_size=2", "model.layer_group_size=1"]),
        (1, [*TRITON, "train.seq_length=64"]),
        (2, [*TRITON, "train.seq_length=128", "parallel.context_parallel_size=2"]),
    ],
    ids=[
        *("hybrid", "softmax", "without_mtp", "tp2", "tp2_chunks", "cp2", "cp2_softmax"),
        *("triton", "cp2_triton"),
    ],
)
def test_what_is_kept_for_the_backward_pass_is_what_the_mixers_say(
    num_ranks: int, words: list[str], on_ranks: OnRanks
) -> None:
    for really, predicted in on_ranks(num_ranks, kept, words):
        assert predicted == pytest.approx(really, rel=KEPT_TOLERANCE)
