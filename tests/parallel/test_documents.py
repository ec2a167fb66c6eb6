"""Packed documents do not see each other, in the whole model, under any layout.

Attention, lightning state, positions, the tokens of MTP and labels all end with a document; with
context parallelism also where a boundary lies on the seam between two ranks.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.short_runs import EP2, PP2, TP2, short_plan

if TYPE_CHECKING:
    from ring_train.runtime.distributed import Groups

TOKENS = 64
CP2 = ["parallel.context_parallel_size=2"]
CP4 = ["parallel.context_parallel_size=4"]
VPP2 = [*PP2, "parallel.virtual_pipeline_model_parallel_size=2"]
LAYOUTS = {
    "one_rank": (1, []),
    "cp2": (2, CP2),
    "cp4": (4, CP4),
    "tp2_cp2_ep2": (4, [*TP2, *CP2, *EP2]),
    "pp2_vpp2": (2, VPP2),
}
ROWS = {
    "on_the_seams": [8, 8, 16, 32],
    "odd": [3, 17, 1, 30, 13],
}
"""Lengths of documents; seams lie at multiples of 16 (cp2) and 8 (cp4)."""
IDS_PER_DOCUMENT = 50
LOSS_TOLERANCE = 1e-6
"""Relative, fp32: sums in another order."""
RUN = [
    "model.mtp_num_layers=2",
    # A mean over all tokens of the batch, which by its meaning joins documents.
    "model.moe_z_loss_coeff=0",
    f"train.seq_length={TOKENS}",
    "train.micro_batch_size=1",
]


def documents_of(lengths: list[int]) -> list[list[int]]:
    """Return documents without a common token."""
    return [
        [number * IDS_PER_DOCUMENT + (7 * i) % IDS_PER_DOCUMENT for i in range(length)]
        for number, length in enumerate(lengths)
    ]


def run_rows(overrides: list[str]) -> dict[str, dict[str, Any]]:
    """Return what the tests compare of every row of ROWS."""
    from ring_train.model.build import build_model
    from ring_train.runtime.distributed import start_runtime
    from ring_train.train.optimizer import attach_schedule_callbacks

    plan = short_plan([*RUN, *overrides, "train.global_batch_size=2"])
    with start_runtime(plan) as groups:
        model = build_model(plan, groups.collection)
        attach_schedule_callbacks(model, None, groups.collection)
        return {
            name: {
                "gradients": gradients_of_each_document(model, groups, lengths),
                "losses": losses(model, groups, lengths),
            }
            for name, lengths in ROWS.items()
        }


def gradients_of_each_document(
    model: Any, groups: Groups, lengths: list[int]
) -> list[dict[int, float]]:
    """Return, for the loss of each document, {document: |gradient of its tokens' embedding|}."""
    import dataclasses

    import torch

    from ring_train.data.batch import pack_documents
    from ring_train.model.tensors import local_tensors
    from ring_train.train.step import forward_backward

    row = pack_documents(documents_of(lengths), num_mtp=2)
    ends = list(accumulate(lengths))
    found = []
    for length, end in zip(lengths, ends, strict=True):
        inside = torch.zeros(TOKENS, dtype=torch.bool)
        inside[end - length : end] = True
        part = dataclasses.replace(
            row, loss_mask=row.loss_mask & inside, mtp_loss_mask=row.mtp_loss_mask & inside
        )
        for chunk in model:
            chunk.zero_grad_buffer()
        forward_backward(
            model, [part, part], groups.collection, num_domains=1, loss_weights=[1.0, 0.5, 0.5]
        )
        for item in local_tensors(model):
            if item.name == "embedding.word_embeddings.weight":
                parameter: Any = item.tensor
                gradient = item.shard.gather(parameter.main_grad)  # [v, h]
                by_token = gradient[: len(lengths) * IDS_PER_DOCUMENT].norm(dim=1)
                by_document = by_token.view(len(lengths), -1).sum(1)
                found.append(dict(enumerate(by_document.tolist())))
    return found


def losses(model: Any, groups: Groups, lengths: list[int]) -> dict[str, list[float]]:
    """Return mean losses of the packed row, and of its documents each in a row of its own."""
    from ring_train.data.batch import pack_documents
    from ring_train.train.step import forward_backward

    documents = documents_of(lengths)
    packed = pack_documents(documents, num_mtp=2)
    alone = [
        pack_documents([document], num_mtp=2, pad_to_multiple=TOKENS) for document in documents
    ]
    found = {}
    for name, rows in (("packed", [packed, packed]), ("alone", [*alone, *alone])):
        sums = forward_backward(model, rows, groups.collection, num_domains=1, loss_weights=None)
        found[name] = [float(sums.lm_loss), *sums.mtp_means().tolist()]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_do_not_see_each_other(layout: str, on_ranks: OnRanks) -> None:
    """The gradient across documents is exactly zero, and a packed row has their weighted loss."""
    ranks, overrides = LAYOUTS[layout]
    for rank, found in enumerate(on_ranks(ranks, run_rows, overrides)):
        for name, lengths in ROWS.items():
            for document, gradients in enumerate(found[name]["gradients"]):
                others = [size for n, size in gradients.items() if n != document]
                assert not any(others), (rank, name, document)
                assert (gradients[document] > 0) == (lengths[document] > 1)
            both = found[name]["losses"]
            assert both["packed"] == pytest.approx(both["alone"], rel=LOSS_TOLERANCE, abs=0)
