"""Layout-free names of the model's tensors, and how a rank's part relates to the whole.

Everything that must not depend on the layout - initial weights, import, export, gradient
comparison - goes through `local_tensors`: logical name (global layer and expert index), the local
tensor, and the `Shard` that cuts it out of the full one. Names: see docs/architecture.md.

Names and shapes do not depend on the kernels of a run either: of a parameter that stacks the
matrices of several experts, each expert's matrix is a tensor of its own here, a view.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model

from ring_train.model.language_model import HybridLanguageModel


@dataclass(frozen=True)
class Shard:
    """How a local tensor is cut out of the full one."""

    dim: int
    """Dimension that is cut."""
    world: int
    """Number of parts."""
    rank: int
    """Which part is local."""
    blocks: int = 1
    """Blocks along `dim` that are cut one by one: 2 for the stacked gate and up projections."""
    group: torch.distributed.ProcessGroup | None = None
    """Ranks that hold the other parts, in order."""

    def of(self, full: torch.Tensor) -> torch.Tensor:
        """Return the local part of a full tensor."""
        parts = [block.chunk(self.world, self.dim)[self.rank] for block in self._blocks(full)]
        return torch.cat(parts, self.dim)

    def full_shape(self, local: torch.Size) -> tuple[int, ...]:
        """Return the full shape that belongs to a local one."""
        return tuple(n * (self.world if i == self.dim else 1) for i, n in enumerate(local))

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """Return the full tensor on every rank of the group. Collective over `group`."""
        if self.world == 1:
            return local
        parts = [torch.empty_like(local) for _ in range(self.world)]
        torch.distributed.all_gather(parts, local.contiguous(), group=self.group)
        split = [self._blocks(part) for part in parts]
        return torch.cat([part for block in zip(*split, strict=True) for part in block], self.dim)

    def _blocks(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensor.chunk(self.blocks, self.dim)


@dataclass(frozen=True)
class LocalTensor:
    """One parameter or saved buffer of this rank."""

    name: str
    """Logical name, the same under every layout."""
    tensor: torch.Tensor
    """The parameter or buffer itself, or a contiguous part of it; write through it under no_grad.
    """
    shard: Shard
    """Its place in the full tensor."""
    is_copy: bool
    """True for the second copy of the embedding on the last stage."""
    owner: torch.Tensor
    """The parameter or buffer, which modules, gradients and optimizers know."""
    start: int = 0
    """First element of `tensor` within the flattened owner."""

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the full tensor."""
        return self.shard.full_shape(self.tensor.shape)

    @property
    def is_parameter(self) -> bool:
        """Whether it belongs to a parameter, not to a buffer."""
        return isinstance(self.owner, torch.nn.Parameter)

    @property
    def gradient(self) -> torch.Tensor:
        """The gradient in DDP's buffer, fp32, of the shape of `tensor`; of a trained parameter."""
        owner: Any = self.owner
        flat = owner.main_grad.view(-1)[self.start : self.start + self.tensor.numel()]
        return flat.view(self.tensor.shape)


def local_tensors(chunks: Iterable[torch.nn.Module]) -> Iterator[LocalTensor]:
    """Yield every parameter and saved buffer of the given model chunks."""
    for model in _models(chunks):
        yield from _items(model, model.named_parameters())
        yield from _items(model, _buffers(model, "expert_bias"))


def expert_loads(chunks: Iterable[torch.nn.Module]) -> Iterator[LocalTensor]:
    """Yield the expert loads of the step before, which the balance loss of the next one reads."""
    for model in _models(chunks):
        yield from _items(model, _buffers(model, "expert_load"))


def _models(chunks: Iterable[torch.nn.Module]) -> Iterator[HybridLanguageModel]:
    """Yield the models inside their wrappers."""
    for chunk in chunks:
        yield get_attr_wrapped_model(chunk, "pre_process", return_model_obj=True)


def _buffers(model: HybridLanguageModel, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, buffer) for name, buffer in model.named_buffers() if name.endswith(kind))


def _items(
    model: HybridLanguageModel, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[LocalTensor]:
    for local_name, owner in tensors:
        start = 0
        for part_name, tensor in _parts(local_name, owner):
            name = _logical_name(model, part_name)
            shard = _shard(model, name, owner, tensor.dim())
            yield LocalTensor(name, tensor, shard, _is_copy(model, name), owner, start)
            start += tensor.numel()


STACKED = {"weight1": "linear_fc1", "weight2": "linear_fc2"}
"""Parameter of `GroupedExperts`, [e/ep, ...]: the projection of each expert that it stacks."""


def _parts(name: str, owner: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name within the chunk, tensor) of what a parameter holds: itself, or its experts."""
    name = plain_name(name)
    head, _, tail = name.rpartition(".experts.")
    projection = STACKED.get(tail) if head else None
    if projection is None:
        yield name, owner
        return
    for number, part in enumerate(owner.detach()):
        yield f"{head}.experts.local_experts.{number}.{projection}.weight", part


ENGINE_NAMES = (
    (r"self_attention\.linear_qkv\.layer_norm_weight", "input_layernorm.weight"),
    (r"mlp\.linear_fc1\.layer_norm_weight", "pre_mlp_layernorm.weight"),
    (r"experts\.(linear_fc[12])\.weight(\d+)", r"experts.local_experts.\2.\1.weight"),
)
"""Ends of names as modules of Transformer Engine have them, and what they are without it: a norm is
part of the projection behind it, and a grouped projection holds one matrix an expert."""


def plain_name(name: str) -> str:
    """Return the name that a parameter of a chunk has where no Transformer Engine built it."""
    for end, plain in ENGINE_NAMES:
        name = re.sub(rf"(?<=\.){end}$", plain, name)
    return name


def _logical_name(model: HybridLanguageModel, name: str) -> str:
    """Return the global name of a tensor of a chunk: layer and expert indices become global."""
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match:
        layer: Any = model.decoder.layers[int(match[1])]
        name = f"decoder.layers.{layer.layer_number - 1}.{match[2]}"
    match = re.match(r"(.*)\.local_experts\.(\d+)\.(.*)", name)
    if match:
        per_rank = (model.plan.config.model.num_moe_experts or 0) // model.plan.mesh.ep
        name = f"{match[1]}.{model.groups.ep.rank() * per_rank + int(match[2])}.{match[3]}"
    return name


def _shard(model: HybridLanguageModel, name: str, owner: Any, dims: int) -> Shard:
    """Return how megatron cut a parameter, or its parts of so many dimensions.

    megatron's tags lie on the parameter; what it stacks has dimensions in front of those of a part.
    """
    group = model.groups.expt_tp if ".experts." in name else model.groups.tp
    if not getattr(owner, "tensor_model_parallel", False) or group.size() == 1:
        return Shard(dim=0, world=1, rank=0)
    blocks = 2 if name.endswith(("linear_fc1.weight", "linear_fc1.lora_b")) else 1
    dim = owner.partition_dim - (owner.dim() - dims)
    return Shard(dim, group.size(), group.rank(), blocks, group)


def _is_copy(model: HybridLanguageModel, name: str) -> bool:
    return name.startswith("embedding.") and not model.pre_process
