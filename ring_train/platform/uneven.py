"""Collectives over parts of different lengths, which gloo refuses: padded to the longest, then cut.

Exact: what is added up is added up in the same order, and padding never reaches a result. They
stand in for the two functions of megatron-core's `tensor_parallel/mappings.py` that tensor
parallelism inside experts calls with split sizes; parts of one length go to the originals.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist

Collective = Callable[..., torch.Tensor]


def padded_gather(original: Collective) -> Collective:
    """Return `_gather_along_first_dim` that also takes `output_split_sizes` on gloo."""

    def gather(
        input_: torch.Tensor,
        group: dist.ProcessGroup,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, use_global_buffer)
        longest = max(output_split_sizes)
        parts = [_empty(input_, longest) for _ in output_split_sizes]
        dist.all_gather(parts, _padded(input_, longest), group=group)
        cut = [part[:size] for part, size in zip(parts, output_split_sizes, strict=True)]
        return torch.cat(cut)

    return gather


def padded_reduce_scatter(original: Collective) -> Collective:
    """Return `_reduce_scatter_along_first_dim` that also takes `input_split_sizes` on gloo."""

    def reduce_scatter(
        input_: torch.Tensor,
        group: dist.ProcessGroup,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return original(input_, group, input_split_sizes, use_global_buffer)
        longest = max(input_split_sizes)
        parts = [_padded(part, longest) for part in input_.split(input_split_sizes)]
        output = _empty(input_, longest)
        dist.reduce_scatter_tensor(output, torch.cat(parts), group=group)
        return output[: input_split_sizes[group.rank()]].contiguous()

    return reduce_scatter


def _empty(like: torch.Tensor, length: int) -> torch.Tensor:
    return like.new_empty(length, *like.shape[1:])


def _padded(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Return the tensor with zero rows appended up to a length."""
    padding = tensor.new_zeros(length - tensor.shape[0], *tensor.shape[1:])
    return torch.cat([tensor, padding])
