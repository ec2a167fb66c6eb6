"""Losses and gradients without the logits of all tokens are those with them, under every layout.

Gradients are read where the optimizer reads them: the head's is added there by the loss itself.
"""

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import OnRanks
from tests.parallel.lora_runs import adapter_gradients
from tests.parallel.short_runs import (
    FIRST_GENERATION,
    PP2,
    TP2,
    gradients_by_name,
    relative_errors,
)

Results = dict[str, Any]
GRADIENT_TOLERANCE = 1e-6
"""Relative, L2, of fp64 runs: gradients are summed in fp32; with all logits the loss is fp32."""
LOSS_TOLERANCE = 1e-6
"""Absolute, of losses near 6: with all logits each is rounded to fp32."""
BF16_LOSS_TOLERANCE = 1e-5
"""Both round the same logits; the sums after that are fp32."""
BF16_HEAD_TOLERANCE = 2**-8
"""With all logits the gradient of the head is rounded to bf16, half a unit of 2^-8 at most."""
BF16_TOLERANCE = 0.05
"""The gradient of the hidden states is summed in another order and rounded to bf16, and some twenty
roundings of the layers below see another number."""
HEAD = "output_layer.weight"
FULL = ["kernels.cross_entropy=full"]
CHUNKED = ["kernels.cross_entropy=chunked", "kernels.cross_entropy_chunk_tokens=5"]
"""Of rows of 32 tokens, so that the last chunk is short, and so is the last tile."""
TWO_DEPTHS = ["model.mtp_num_layers=2"]
DENSE = ["model.num_moe_experts=null", "model.mtp_num_layers=0", "model.first_k_dense_replace=4"]
UNCERTIFIED = "parallel.allow_uncertified=true"
OVERLAP = ["parallel.overlap_grad_reduce=true"]
RECOMPUTE = [
    *("parallel.recompute_granularity=full", "parallel.recompute_method=uniform"),
    "parallel.recompute_num_layers=1",
]
LAYOUTS = {
    "one_rank": (1, TWO_DEPTHS),
    "tp2_sp": (2, [*TWO_DEPTHS, *TP2]),
    "tp2": (2, [*DENSE, *TP2, "parallel.sequence_parallel=false", UNCERTIFIED]),
    "tp2_norm_head": (2, [*FIRST_GENERATION, *TP2]),
    "pp2_recomputed": (2, [*TWO_DEPTHS, *PP2, *RECOMPUTE]),
    "dp2_overlap": (2, [*TWO_DEPTHS, *OVERLAP]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_of_all_logits(
    layout: str, fp64: None, on_ranks: OnRanks
) -> None:
    ranks, words = LAYOUTS[layout]
    wholes, parts = zip(*on_ranks(ranks, both, gradients_by_name, words), strict=True)
    assert_equal(wholes, parts)
    assert any(HEAD in part["gradients"] for part in parts)


def test_a_frozen_head_passes_gradients_on(fp64: None, on_ranks: OnRanks) -> None:
    wholes, parts = zip(*on_ranks(2, both, adapter_gradients, TP2), strict=True)
    assert_equal(wholes, parts)
    assert all(HEAD in part["names"] - part["gradients"].keys() for part in parts)


def both(gradients: Callable[[list[str]], Results], words: list[str]) -> tuple[Results, Results]:
    """Return losses and gradients with all logits, and in chunks."""
    return gradients([*words, *FULL]), gradients([*words, *CHUNKED])


def assert_equal(wholes: tuple[Results, ...], parts: tuple[Results, ...]) -> None:
    for whole, part in zip(wholes, parts, strict=True):
        assert part["losses"] == pytest.approx(whole["losses"], abs=LOSS_TOLERANCE, rel=0)
        assert part["gradients"].keys() == whole["gradients"].keys()
        errors = relative_errors(part["gradients"], whole["gradients"])
        assert not {name: e for name, e in errors.items() if e > GRADIENT_TOLERANCE}
    # Both ways were really taken: fp64 losses are not those that were rounded to fp32.
    assert parts[-1]["losses"] != wholes[-1]["losses"]


def test_bf16_differs_by_its_roundings(on_ranks: OnRanks) -> None:
    words = [*TWO_DEPTHS, *TP2, "train.precision=bf16"]
    whole, part = on_ranks(2, both, gradients_by_name, words)[0]
    assert part["losses"] == pytest.approx(whole["losses"], abs=BF16_LOSS_TOLERANCE, rel=0)
    errors = relative_errors(part["gradients"], whole["gradients"])
    assert 0 < errors[HEAD] < BF16_HEAD_TOLERANCE
    assert not {name: e for name, e in errors.items() if e > BF16_TOLERANCE}


def misfit() -> dict[str, str]:
    """Return what each refusal of a loss says."""
    import torch

    from ring_train.model.cross_entropy import Chunks, chunked_cross_entropy

    group = torch.distributed.group.WORLD
    assert group is not None
    hidden, weight = torch.ones(4, 8), torch.ones(6, 8)
    labels, chunks = torch.tensor([0, 11, 3, 5]), Chunks(group, 2)
    chunked_cross_entropy(hidden, weight, labels, chunks)
    wrong = {
        "above": (hidden, weight, labels + 1),
        "below": (hidden, weight, labels - 1),
        "dtype": (hidden.double(), weight, labels),
        "width": (hidden[:, :7], weight, labels),
        "length": (hidden, weight, labels[:3]),
    }
    said = {}
    for name, (x, w, y) in wrong.items():
        with pytest.raises(ValueError, match="give") as caught:
            chunked_cross_entropy(x, w, y, chunks)
        said[name] = str(caught.value)
    return said


def test_labels_outside_the_vocabulary_of_all_ranks_are_refused(on_ranks: OnRanks) -> None:
    for said in on_ranks(2, misfit):
        assert "labels from 1 to 12 are not within a vocabulary of 12 ids" in said["above"]
        assert "labels from -1 to 10 are not within a vocabulary of 12 ids" in said["below"]
        assert "does not fit weight=(6, 8) torch.float32" in said["dtype"]
        assert "hidden=(4, 7)" in said["width"]
        assert "labels=(3,) does not match hidden=(4, 8)" in said["length"]


def largest_tensor(chunk_tokens: int, frozen: bool) -> int:
    """Return the elements of the largest tensor that losses and their backward pass make."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from ring_train.model.cross_entropy import Chunks, chunked_cross_entropy

    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in owned:
                    self.found = max(self.found, x.untyped_storage().nbytes() // x.element_size())
            return out

    group = torch.distributed.group.WORLD
    assert group is not None
    hidden = torch.randn(96, 8, requires_grad=True)
    weight: Any = torch.randn(640, 8, requires_grad=not frozen)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(640, 8), False
    owned = {x.untyped_storage().data_ptr() for x in (hidden, weight, weight.main_grad)}
    with Largest() as largest:
        losses = chunked_cross_entropy(
            hidden, weight, torch.arange(96), Chunks(group, chunk_tokens)
        )
        losses.backward(torch.ones(96))
    assert weight.grad_added_to_main_grad != frozen
    assert bool(weight.main_grad.any()) != frozen
    return largest.found


def test_no_tensor_is_larger_than_the_logits_of_a_chunk(on_ranks: OnRanks) -> None:
    for frozen in (False, True):
        assert on_ranks(1, largest_tensor, 12, frozen)[0] <= 12 * 640
        assert on_ranks(1, largest_tensor, 96, frozen)[0] == 96 * 640
