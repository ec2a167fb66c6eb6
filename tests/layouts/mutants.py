"""Faults that a layout could have, each put into the running code of one rank world.

A mutant is a function that returns patches; it runs on every rank after the imports and before the
model is built. Each is a mistake of the kind that public frameworks have shipped: a missing or
doubled reduction, a wrong group, a shift at a seam, an index that is local where it should be
global. The comparison of `tests/layouts/test_matrix.py` must notice every one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

from tests.layouts import context_faults, model_faults
from tests.layouts.matrix import Layout, run_layout

Patches = list[Any]


@dataclass(frozen=True)
class Mutant:
    """One fault, and the smallest layout in which it shows."""

    fault: str
    layout: Layout
    patches: Callable[[], Patches]


def run_mutant(name: str) -> dict[str, Any]:
    """Return what `run_layout` returns with the fault in place."""
    mutant = MUTANTS[name]
    import ring_train.model.build
    import ring_train.train.step  # noqa: F401  (patches need the modules)

    with contextlib.ExitStack() as stack:
        for patch in mutant.patches():
            stack.enter_context(patch)
        return run_layout(mutant.layout, mutant.layout.variant)


def _layout(variant: str = "plain", **degrees: int) -> Layout:
    return Layout(tuple(degrees.items()), variant)


def _nothing(*_: Any, **__: Any) -> None:
    return None


def no_gradient_reduction() -> Patches:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    return [
        mock.patch.object(Group, "start_grad_sync", _nothing),
        mock.patch.object(Group, "finish_grad_sync", _nothing),
    ]


def parameters_not_gathered() -> Patches:
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Group

    def start_param_sync(self: Any, *_: Any, **__: Any) -> None:
        self.param_gather_dispatched = True

    return [mock.patch.object(Group, "start_param_sync", start_param_sync)]


def gradient_norm_of_each_rank() -> Patches:
    from megatron.core import parallel_state
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def alone(self: Any) -> Any:
        return parallel_state.get_tensor_model_parallel_group()  # this rank alone

    return [mock.patch.object(DistributedOptimizer, "get_grad_stats_parallel_group", alone)]


def no_reduction_of_sequence_parallel_parameters() -> Patches:
    from megatron.core.distributed import finalize_model_grads

    module = __import__("sys").modules[finalize_model_grads.__module__]
    return [mock.patch.object(module, "_allreduce_non_tensor_model_parallel_grads", _nothing)]


def no_reduction_of_the_shared_embedding() -> Patches:
    from megatron.core.distributed import finalize_model_grads

    module = __import__("sys").modules[finalize_model_grads.__module__]
    return [mock.patch.object(module, "_allreduce_word_embedding_grads", _nothing)]


def _with_groups(change: Callable[[Any], None]) -> Patches:
    """Change the process groups that the model's data parallelism is given."""
    import copy

    from ring_train.model import build

    original = build.DistributedDataParallel

    def wrapped(*args: Any, pg_collection: Any, **kwargs: Any) -> Any:
        groups = copy.copy(pg_collection)
        change(groups)
        return original(*args, pg_collection=groups, **kwargs)

    return [mock.patch.object(build, "DistributedDataParallel", wrapped)]


def experts_reduced_over_the_dense_group() -> Patches:
    def change(groups: Any) -> None:
        groups.expt_dp = groups.dp_cp

    return _with_groups(change)


def gradients_reduced_without_context_ranks() -> Patches:
    def change(groups: Any) -> None:
        groups.dp_cp = groups.dp

    return _with_groups(change)


def _loss_times(factor: float) -> Patches:
    from ring_train.train import step

    original = step._loss

    def loss(*args: Any, **kwargs: Any) -> Any:
        total, count, report = original(*args, **kwargs)
        return total * factor, count, report

    return [mock.patch.object(step, "_loss", loss)]


def loss_scaled_twice() -> Patches:
    return _loss_times(0.5)


def loss_normalised_by_local_counts() -> Patches:
    from ring_train.train import step

    def local(micro_batches: Any, groups: Any) -> Any:
        with mock.patch.object(step.torch.distributed, "all_reduce", _nothing):
            return original(micro_batches, groups)

    original = step.global_counts
    return [mock.patch.object(step, "global_counts", local)]


def _with_group(name: str, other: str) -> Patches:
    """`finish_router_step` uses one process group for another."""
    from ring_train.model import router

    original = router.finish_router_step

    def finish(model: Any, groups: Any, rate: float) -> Any:
        import copy

        changed = copy.copy(groups)
        setattr(changed, name, getattr(groups, other))
        return original(model, changed, rate)

    return [mock.patch.object(router, "finish_router_step", finish)]


def expert_counts_not_summed() -> Patches:
    return _with_group("tp_dp_cp", "pp")


def expert_counts_summed_over_data_ranks_only() -> Patches:
    return _with_group("tp_dp_cp", "dp")


def expert_counts_doubled_by_recomputation() -> Patches:
    from ring_train.model.router import ExpertRouter

    original = ExpertRouter.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        if torch.is_grad_enabled():
            return original(self, *args, **kwargs)
        with torch.enable_grad():
            return original(self, *args, **kwargs)

    return [mock.patch.object(ExpertRouter, "forward", forward)]


def z_loss_divided_by_local_tokens() -> Patches:
    from ring_train.train import step

    original = step.begin_router_step
    return [mock.patch.object(step, "begin_router_step", lambda model, n: original(model, n // 2))]


def expert_loads_of_this_rank_alone() -> Patches:
    """The balance loss weighs scores with the counts of one rank."""
    from ring_train.model import router

    original = router.finish_router_step

    def finish(model: Any, *args: Any) -> Any:
        own = [found.tokens_per_expert.clone() for found in router.routers(model)]
        loads = original(model, *args)
        for found, counts in zip(router.routers(model), own, strict=True):
            found.expert_load.copy_(router.relative_load(counts))
        return loads

    return [mock.patch.object(router, "finish_router_step", finish)]


def loss_reported_by_this_rank_alone() -> Patches:
    from ring_train.train import step

    original = step._reduce

    def reduce(*args: Any) -> Any:
        with mock.patch.object(step.torch.distributed, "all_reduce", _nothing):
            return original(*args)

    return [mock.patch.object(step, "_reduce", reduce)]


def _mutant(patches: Callable[[], Patches], layout: Layout) -> Mutant:
    return Mutant(patches.__name__.replace("_", " "), layout, patches)


MUTANTS = {
    mutant.patches.__name__: mutant
    for mutant in (
        _mutant(no_gradient_reduction, _layout(dp=2)),
        _mutant(parameters_not_gathered, _layout("full", dp=2)),
        _mutant(gradient_norm_of_each_rank, _layout("full", dp=2)),
        _mutant(no_reduction_of_sequence_parallel_parameters, _layout(tp=2)),
        _mutant(no_reduction_of_the_shared_embedding, _layout(pp=2)),
        _mutant(experts_reduced_over_the_dense_group, _layout(ep=2, dp=2)),
        _mutant(gradients_reduced_without_context_ranks, _layout(cp=2)),
        _mutant(loss_scaled_twice, _layout(dp=2)),
        _mutant(loss_normalised_by_local_counts, _layout(dp=2)),
        _mutant(loss_reported_by_this_rank_alone, _layout(dp=2)),
        _mutant(expert_counts_not_summed, _layout(dp=2)),
        _mutant(expert_counts_summed_over_data_ranks_only, _layout(tp=2)),
        _mutant(expert_counts_doubled_by_recomputation, _layout("full")),
        _mutant(z_loss_divided_by_local_tokens, _layout(cp=2)),
        _mutant(expert_loads_of_this_rank_alone, _layout("v1", dp=2)),
        _mutant(context_faults.mtp_tokens_shifted_by_one_on_later_ranks, _layout(cp=2)),
        _mutant(context_faults.positions_restart_on_each_rank, _layout(cp=2)),
        _mutant(context_faults.labels_cut_without_zigzag, _layout(cp=2)),
        _mutant(context_faults.state_decays_one_token_too_much, _layout(cp=2)),
        _mutant(context_faults.state_does_not_cross_ranks, _layout(cp=2)),
        _mutant(context_faults.state_passes_one_seam_only, _layout(cp=4)),
        _mutant(context_faults.state_leaks_into_the_next_document, _layout(cp=2)),
        _mutant(context_faults.no_gradient_through_the_state, _layout(cp=2)),
        _mutant(context_faults.gradients_of_keys_stay_on_their_rank, _layout(cp=2)),
        _mutant(context_faults.keys_in_the_order_of_ranks, _layout(cp=2)),
        _mutant(model_faults.decay_by_the_layer_of_the_stage, _layout(pp=2)),
        _mutant(model_faults.every_tensor_rank_takes_the_first_slopes, _layout(tp=2)),
        _mutant(model_faults.gate_norm_stored_as_replicated, _layout(tp=2)),
        _mutant(model_faults.norms_not_tagged_for_sequence_parallelism, _layout(tp=2)),
        _mutant(model_faults.router_not_tagged_for_sequence_parallelism, _layout(tp=2)),
        _mutant(model_faults.experts_numbered_by_rank, _layout(ep=2, dp=2)),
        _mutant(model_faults.partial_sums_of_sharded_experts, _layout(tp=2, etp=2)),
        _mutant(model_faults.chunks_in_the_order_of_ranks, _layout(pp=2, vpp=2)),
        _mutant(model_faults.cross_entropy_of_each_shard_alone, _layout(tp=2)),
        _mutant(model_faults.head_norms_of_each_shard, _layout("v1", tp=2)),
        _mutant(model_faults.padding_of_another_tensor_rank, _layout("full", tp=2)),
    )
}
