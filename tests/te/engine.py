"""A model of Transformer Engine's real modules where there is no GPU.

They are constructed for real, with torch.cuda answering as an H100 would. They cannot compute here:
`plain_forwards` gives each of them the forward that its documentation describes, in plain torch and
megatron-core's collectives. So what is compared is how the parts are put together, never what
Transformer Engine computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformer_engine.pytorch as te
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch.nn.functional import linear
from transformer_engine.pytorch import distributed

from ring_train.model import build
from ring_train.ops.attention import document_attention
from ring_train.ops.norm import rms_norm

H100 = SimpleNamespace(major=9, minor=0, name="H100", multi_processor_count=132)


@contextlib.contextmanager
def answers_of_an_h100() -> Iterator[None]:
    """torch.cuda answers what modules ask while they are constructed."""
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (H100.major, H100.minor),
        "get_device_properties": lambda device=None: H100,
        "get_device_name": lambda device=None: H100.name,
    }
    with mock.patch.multiple(torch.cuda, **answers):
        yield


@contextlib.contextmanager
def models_as_on_a_gpu() -> Iterator[None]:
    """`build_model` builds on the CPU what it builds on a GPU."""
    original = build.build_model

    def build_model(*args: Any) -> Any:
        with answers_of_an_h100():
            return original(*args)

    with mock.patch.object(build, "build_model", build_model):
        yield


def with_engine(function: Callable[..., Any], *args: Any) -> Any:
    """Return function(*args) where models are built as on a GPU and compute in plain torch."""
    with models_as_on_a_gpu(), plain_forwards():
        return function(*args)


@contextlib.contextmanager
def plain_forwards() -> Iterator[None]:
    """The modules that a layer may hold compute in plain torch."""
    forwards = {
        te.Linear: _linear,
        te.LayerNormLinear: _norm_linear,
        te.GroupedLinear: _grouped_linear,
        te.RMSNorm: lambda self, x: rms_norm(x, self.weight, self.eps, backend="torch"),
        te.DotProductAttention: _attention,
        te.Fp8Padding: lambda self, x, splits: (x, splits),
        te.Fp8Unpadding: lambda self, x, splits: x,
    }
    asked: list[tuple[Any, str, Any]] = [
        (torch.cuda, "get_device_properties", lambda device=None: H100),
        (distributed, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state()),
        (distributed, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state)),
    ]
    with contextlib.ExitStack() as stack:
        for place, name, answer in asked:
            stack.enter_context(mock.patch.object(place, name, answer))
        for module, forward in forwards.items():
            stack.enter_context(mock.patch.object(module, "forward", forward))
        yield


def _linear(self: Any, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
    if self.tp_size == 1 or self.parallel_mode is None:
        return linear(x, self.weight)
    group = self.tp_group
    if self.parallel_mode == "row":
        output = linear(x, self.weight)
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(output, group=group)
        return reduce_from_tensor_model_parallel_region(output, group=group)
    if self.sequence_parallel:
        return linear(gather_from_sequence_parallel_region(x, group=group), self.weight)
    return linear(copy_to_tensor_model_parallel_region(x, group=group), self.weight)


def _norm_linear(
    self: Any, x: torch.Tensor, is_first_microbatch: bool | None = None
) -> torch.Tensor:
    return _linear(self, rms_norm(x, self.layer_norm_weight, self.eps, backend="torch"))


def _grouped_linear(
    self: Any, x: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None
) -> torch.Tensor:
    parts = enumerate(x.split(m_splits))
    return torch.cat([linear(part, getattr(self, f"weight{i}")) for i, part in parts])


def _attention(
    self: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> torch.Tensor:
    assert (kwargs["qkv_format"], kwargs["attn_mask_type"]) == ("thd", "padding_causal")
    boundaries = kwargs["cu_seqlens_q"]
    assert boundaries.dtype is torch.int32
    assert boundaries.equal(kwargs["cu_seqlens_kv"])
    lengths = tuple(boundaries.diff().tolist())
    assert kwargs["max_seqlen_q"] == kwargs["max_seqlen_kv"] == max(lengths)
    out = document_attention(
        *(query, key, value), cu_seqlens=boundaries, lengths=lengths, scale=self.softmax_scale
    )
    return out.flatten(1)  # [t, n*d/tp]
