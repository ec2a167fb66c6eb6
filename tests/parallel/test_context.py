"""Both mixers under context parallelism equal one rank, wherever documents are cut."""

from __future__ import annotations

import contextlib
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import OnRanks

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-12
"""Relative, L2, in fp64: sums of some hundred terms in another order."""
TOLERANCE_FP32 = 1e-6
"""The same with roundings of 6e-8."""
HEADS, GROUPS, DIM = 4, 2, 8
TOKENS = 96
DOCUMENTS = {
    "one_document": [96],
    "on_the_seams": [12, 12, 24, 48],
    "odd": [1, 18, 5, 1, 40, 31],
    "a_document_within_a_segment": [13, 2, 81],
    "single_tokens": [1] * 96,
}
"""Lengths of documents in a row; with cp = 4 a segment has 12 tokens, with cp = 2 24."""
MIXERS = ("lightning", "softmax")


def run_mixer(
    mixer: str, lengths: list[int], disturbed: int | None = None, backend: str = "auto"
) -> dict[str, torch.Tensor]:
    """Return output and gradients of the whole row, gathered from the ranks of the world.

    Args:
        mixer: which.
        lengths: of the documents.
        disturbed: a document whose queries, keys and values are other ones.
        backend: of lightning attention; Triton runs in its interpreter, in fp32.
    """
    import torch

    from ring_train.model.context import context_lightning_attention, context_softmax_attention
    from ring_train.model.documents import make_documents
    from ring_train.ops.decay import decay_slopes
    from ring_train.plan.context import own_tokens

    group = torch.distributed.group.WORLD
    assert group is not None
    cp, rank = group.size(), group.rank()
    generator = torch.Generator().manual_seed(5)
    heads = {"q": HEADS, "k": GROUPS, "v": GROUPS, "grad": HEADS}
    if mixer == "lightning":
        heads |= {"k": HEADS, "v": HEADS}
    row = {
        name: torch.randn(TOKENS, n, DIM, generator=generator, dtype=torch.float64)
        for name, n in heads.items()
    }
    if disturbed is not None:
        start = sum(lengths[:disturbed])
        for tensor in row.values():
            tensor[start : start + lengths[disturbed]] *= -3
    ranges = own_tokens(TOKENS, cp, rank)
    dtype = torch.float32 if backend == "triton" else torch.float64
    own = {name: torch.cat([x[a:b] for a, b in ranges]).to(dtype) for name, x in row.items()}
    q, k, v = (own[name].requires_grad_() for name in "qkv")
    boundaries = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    documents = make_documents(boundaries, cp, rank)
    if mixer == "lightning":
        slopes = decay_slopes(HEADS, 1, 4, "zero_based", torch.float64)
        if documents.context is None:
            out = _one_rank_lightning(q, k, v, slopes, documents)
        else:
            out = context_lightning_attention(
                *(q, k, v, slopes), documents=documents, group=group, backend=backend
            )
    elif documents.context is None:
        out = _one_rank_softmax(q, k, v, documents)
    else:
        out = context_softmax_attention(
            q, k, v, row=documents.context, group=group, scale=DIM**-0.5
        )
    (out * own["grad"]).sum().backward()
    found: dict[str, Any] = {"out": out, "q": q.grad, "k": k.grad, "v": v.grad}
    return {name: _whole(tensor.detach(), group) for name, tensor in found.items()}


def _one_rank_lightning(q: Any, k: Any, v: Any, slopes: Any, documents: Any) -> torch.Tensor:
    from ring_train.ops.lightning import lightning_attention_recurrent_reference

    out, _ = lightning_attention_recurrent_reference(
        q, k, v, slopes, cu_seqlens=documents.cu_seqlens_q
    )
    return out


def _one_rank_softmax(q: Any, k: Any, v: Any, documents: Any) -> torch.Tensor:
    from ring_train.ops.attention import document_attention_reference

    return document_attention_reference(q, k, v, cu_seqlens=documents.cu_seqlens_q)


def _whole(part: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the row [t, ...] from what every rank holds."""
    import torch

    from ring_train.plan.context import own_tokens

    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    whole = part.new_empty(TOKENS, *part.shape[1:])
    for rank, held in enumerate(parts):
        first = 0
        for start, stop in own_tokens(TOKENS, group.size(), rank):
            whole[start:stop] = held[first : first + stop - start]
            first += stop - start
    return whole


def run_cases(mixer: str) -> dict[str, dict[str, torch.Tensor]]:
    return {name: run_mixer(mixer, lengths) for name, lengths in DOCUMENTS.items()}


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("mixer", MIXERS)
def test_outputs_and_gradients_equal_the_reference_on_one_rank(
    mixer: str, cp: int, on_ranks: OnRanks
) -> None:
    expected = on_ranks(1, run_cases, mixer)[0]
    for found in on_ranks(cp, run_cases, mixer):
        for case, tensors in found.items():
            for name, tensor in tensors.items():
                reference = expected[case][name]
                error = (tensor - reference).norm()
                assert error <= TOLERANCE * reference.norm(), (case, name)


def triton_cases() -> dict[str, dict[str, torch.Tensor]]:
    names = ("one_document", "odd")
    return {name: run_mixer("lightning", DOCUMENTS[name], backend="triton") for name in names}


def test_states_pass_between_ranks_through_the_triton_kernels(on_ranks: OnRanks) -> None:
    expected = on_ranks(1, run_cases, "lightning")[0]
    for case, tensors in on_ranks(2, triton_cases)[0].items():
        for name, tensor in tensors.items():
            reference = expected[case][name]
            error = (tensor.double() - reference).norm()
            assert error <= TOLERANCE_FP32 * reference.norm(), (case, name)


def disturb(mixer: str) -> list[dict[str, torch.Tensor]]:
    lengths = DOCUMENTS["odd"]
    return [run_mixer(mixer, lengths, disturbed=n) for n in (None, *range(len(lengths)))]


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_document_is_bit_equal_whatever_its_neighbours_hold(
    mixer: str, on_ranks: OnRanks
) -> None:
    """Outputs and gradients: no path leads from one document to another across ranks."""
    lengths = DOCUMENTS["odd"]
    plain, *changed = on_ranks(4, disturb, mixer)[0]
    starts = [0, *accumulate(lengths)]
    for number, found in enumerate(changed):
        for name, tensor in found.items():
            same = (tensor == plain[name]).flatten(1).all(1)  # [t]
            inside = slice(starts[number], starts[number + 1])
            assert name != "out" or not same[inside].any(), "the disturbance must be felt"
            same[inside] = True
            assert same.all(), (number, name)


BYTES_TOKENS = (8 * 1024, 64 * 1024, 1024 * 1024)


def exchanged_bytes(tokens: int) -> dict[str, int]:
    """Return the bytes that this rank hands to collectives in forward and backward."""
    from unittest import mock

    import torch

    from ring_train.model.context import context_lightning_attention
    from ring_train.model.documents import make_documents

    group = torch.distributed.group.WORLD
    assert group is not None
    counted = {"calls": 0, "bytes": 0}
    dist = torch.distributed

    def counting(function: Any) -> Any:
        def call(output: torch.Tensor, own: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            counted["calls"] += 1
            counted["bytes"] += max(output.nbytes, own.nbytes)
            return function(output, own, *args, **kwargs)

        return call

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective that is not counted")

    documents = make_documents(torch.tensor([0, 1001, tokens]), group.size(), group.rank())
    assert documents.context is not None
    q, k, v = (torch.ones(tokens // group.size(), 1, 4, requires_grad=True) for _ in range(3))
    others = ("all_reduce", "all_gather", "broadcast", "all_to_all_single", "send", "recv", "isend")
    with (
        mock.patch.object(dist, "all_gather_into_tensor", counting(dist.all_gather_into_tensor)),
        mock.patch.object(dist, "reduce_scatter_tensor", counting(dist.reduce_scatter_tensor)),
        contextlib.ExitStack() as stack,
    ):
        for name in others:
            stack.enter_context(mock.patch.object(dist, name, refuse))
        out = context_lightning_attention(
            q,
            k,
            v,
            torch.tensor([0.1]),
            documents=documents,
            group=group,
        )
        out.sum().backward()
    return counted


def test_lightning_exchanges_the_same_bytes_from_8k_to_1m_tokens(on_ranks: OnRanks) -> None:
    state = 1 * 4 * 4 * 4  # bytes of one fp32 state: a head, d = dv = 4
    for tokens in BYTES_TOKENS:
        for counted in on_ranks(2, exchanged_bytes, tokens):
            # Forward and backward gather the states of the four segments of two ranks.
            assert counted == {"calls": 2, "bytes": 2 * 4 * state}
