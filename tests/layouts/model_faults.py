"""Faults of sharded modules; see tests.layouts.mutants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

Patches = list[Any]


def decay_by_the_layer_of_the_stage() -> Patches:
    from ring_train.model import lightning

    original = lightning.decay_slopes
    return [
        mock.patch.object(
            lightning,
            "decay_slopes",
            lambda n, index, *rest, **kw: original(n, index % 2, *rest, **kw),
        )
    ]


def every_tensor_rank_takes_the_first_slopes() -> Patches:
    from ring_train.model import lightning

    original = lightning.decay_slopes

    def slopes(heads: int, *args: Any, **kwargs: Any) -> Any:
        whole = original(heads, *args, **kwargs)
        return whole[: heads // 2].repeat(2)

    return [mock.patch.object(lightning, "decay_slopes", slopes)]


def gate_norm_stored_as_replicated() -> Patches:
    from ring_train.model.norm import GatedGroupNorm

    original = GatedGroupNorm.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.weight.tensor_model_parallel = False
        self.weight.sequence_parallel = True

    return [mock.patch.object(GatedGroupNorm, "__init__", init)]


def norms_not_tagged_for_sequence_parallelism() -> Patches:
    from ring_train.model.norm import RMSNorm

    original = RMSNorm.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    return [mock.patch.object(RMSNorm, "__init__", init)]


def router_not_tagged_for_sequence_parallelism() -> Patches:
    from ring_train.model.router import ExpertRouter

    original = ExpertRouter.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.weight.sequence_parallel = False

    return [mock.patch.object(ExpertRouter, "__init__", init)]


def experts_numbered_by_rank() -> Patches:
    """Every expert-parallel rank draws the weights of the first experts."""
    from ring_train.model import init as init_module
    from ring_train.model.tensors import local_tensors

    def renumbered(chunks: Any) -> Any:
        for item in local_tensors(chunks):
            name = item.name
            if ".experts." in name:
                head, _, tail = name.partition(".experts.")
                number, _, rest = tail.partition(".")
                name = f"{head}.experts.{int(number) % 4}.{rest}"
            yield replace(item, name=name)

    return [mock.patch.object(init_module, "local_tensors", renumbered)]


def partial_sums_of_sharded_experts() -> Patches:
    """What expert-tensor-parallel ranks compute is cut instead of summed."""
    from megatron.core.transformer.moe import token_dispatcher

    def cut(tokens: Any, group: Any, input_split_sizes: Any = None, *_: Any) -> Any:
        if input_split_sizes is None:
            return tokens.chunk(group.size())[group.rank()]
        return tokens.split(input_split_sizes)[group.rank()]

    return [mock.patch.object(token_dispatcher, "reduce_scatter_to_sequence_parallel_region", cut)]


def chunks_in_the_order_of_ranks() -> Patches:
    """A virtual stage takes rank * vpp + chunk for chunk * pp + rank."""
    from ring_train.model import build

    original = build.HybridLanguageModel

    def built(plan: Any, config: Any, groups: Any, vp_stage: int | None) -> Any:
        stages = plan.pipeline.stages
        pp, vpp = plan.mesh.pp, plan.mesh.vpp
        order = [stages[(s % pp) * vpp + s // pp] for s in range(pp * vpp)]
        pipeline = replace(plan.pipeline, stages=tuple(order))
        return original(replace(plan, pipeline=pipeline), config, groups, vp_stage)

    return [mock.patch.object(build, "HybridLanguageModel", built)]


def cross_entropy_of_each_shard_alone() -> Patches:
    """The softmax of the vocabulary is not normalised over tensor-parallel ranks."""
    from ring_train.model import language_model

    def alone(logits: Any, labels: Any, tp_group: Any) -> Any:
        import torch

        rank, size = tp_group.rank(), logits.shape[-1]
        local = (labels - rank * size).clamp(0, size - 1)
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), local.flatten(), reduction="none"
        ).view_as(labels)

    return [
        mock.patch.object(language_model.tensor_parallel, "vocab_parallel_cross_entropy", alone)
    ]


def padding_of_another_tensor_rank() -> Patches:
    from ring_train.model.language_model import HybridLanguageModel

    def mask(self: Any, batch: Any) -> Any:
        if not batch.num_padding:
            return None
        return batch.padding_mask.chunk(self.groups.tp.size())[0][None]

    return [mock.patch.object(HybridLanguageModel, "_padding_mask", mask)]


def head_norms_of_each_shard() -> Patches:
    """The head is normalised over the vocabulary of one tensor rank."""
    from ring_train.model.head import OutputLayer

    def norms(self: Any) -> Any:
        return self.weight.detach().norm(dim=0)

    return [mock.patch.object(OutputLayer, "channel_norms", norms)]
