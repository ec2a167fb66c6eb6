"""Cross-entropy tile by tile, in torch and in interpreted Triton, against torch's own in fp64."""

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ring_train.ops.cross_entropy import (
    add_product_,
    check_labels,
    gradient_tile,
    joined_statistics,
    logit_statistics,
    logits_to_gradient_,
    losses_of,
    product,
)

# isort: split
from ring_train.ops.kernels import cross_entropy as kernels

TIGHT_FP64 = 1e-12  # sums of up to 5000 roundings of 1e-16
ABSOLUTE_FP32 = 3e-6  # exponentials and their sum rounded to 6e-8 each, of values up to 20
SUMMED_FP32 = 1e-4  # 300 roundings of partial sums up to 50, 3e-6 each; bf16 would be 0.1 off
BACKENDS: dict[str, tuple[torch.dtype, float]] = {
    "torch": (torch.float64, TIGHT_FP64),
    "triton": (torch.float32, ABSOLUTE_FP32),
}


def make_logits(tokens: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits, labels and gradients of the losses, in fp64."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    return logits, labels, torch.randn(tokens, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("programs", [1, 8])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("vocabulary", "tiles"), [(1, 1), (130, 3), (5000, 1), (9000, 2)])
def test_losses_and_gradient_are_those_of_the_whole_vocabulary(
    programs: int, backend: str, vocabulary: int, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program a processor leaves rows whole, eight cut them at every block."""
    monkeypatch.setattr(kernels, "PROGRAMS_PER_PROCESSOR", programs)
    monkeypatch.setattr(kernels, "num_processors", lambda device: 5)
    dtype, tolerance = BACKENDS[backend]
    logits, labels, grad = make_logits(5, vocabulary)
    leaf = logits.clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, labels, reduction="none")
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad)
    parts = logits.to(dtype).tensor_split(tiles, dim=1)  # rows with gaps
    firsts = [int(part.storage_offset()) for part in parts]
    pairs = list(zip(parts, firsts, strict=True))
    statistics = [logit_statistics(part, labels - at, backend=backend) for part, at in pairs]
    losses, log_sum_exp = losses_of(joined_statistics(torch.stack(statistics)))
    assert losses.dtype == dtype
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=0, atol=tolerance)
    for part, at in pairs:
        found = logits_to_gradient_(part, labels - at, log_sum_exp, grad.to(dtype), backend=backend)
        assert found.data_ptr() == part.data_ptr(), "in place"
        wanted = expected_grad[:, at : at + part.shape[1]]
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=tolerance)


def test_rows_are_cut_into_parts_where_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "num_processors", lambda device: 5)
    logits, labels, _ = make_logits(5, 9000)
    assert len(kernels.make_statistics(logits.float(), labels)) == 3
    monkeypatch.setattr(kernels, "PROGRAMS_PER_PROCESSOR", 1)
    assert len(kernels.make_statistics(logits.float(), labels)) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_far_apart_make_no_nan_and_nan_is_not_lost(backend: str) -> None:
    logits = torch.tensor([[-torch.inf, 1e30, 3.0], [-1e30] * 3, [1.0, torch.nan, 2.0]])
    statistics = logit_statistics(logits, torch.tensor([1, 2, 0]), backend=backend)
    losses, log_sum_exp = losses_of(statistics)
    assert log_sum_exp[:2].tolist() == pytest.approx([1e30, -1e30])
    assert losses[:2].tolist() == [0.0, 0.0]
    assert losses[2].isnan()


def test_bf16_logits_have_statistics_in_fp32() -> None:
    logits, labels, grad = make_logits(6, 50)
    logits = logits.bfloat16()
    found = logit_statistics(logits, labels)
    torch.testing.assert_close(found, logit_statistics(logits.float(), labels), rtol=0, atol=0)
    assert found.dtype == torch.float32
    log_sum_exp, grad = losses_of(found)[1], grad.float()
    wide = logits_to_gradient_(logits.float(), labels, log_sum_exp, grad)
    again = logits_to_gradient_(logits, labels, log_sum_exp, grad)
    assert again is logits
    assert torch.equal(again, wide.bfloat16())


@given(st.integers(1, 300_000), st.integers(1, 200_000), st.integers(1, 20_000), st.booleans())
def test_a_tile_holds_no_more_logits_than_a_chunk(
    tokens: int, ids: int, chunk: int, trained: bool
) -> None:
    tile = gradient_tile(tokens, ids, chunk, trained)
    assert 1 <= tile.tokens <= tokens
    assert 1 <= tile.ids <= ids
    assert tile.tokens * tile.ids <= chunk * ids
    # No more tiles than twice what the logits fill.
    if chunk >= 128 <= ids:
        number = -(-tokens // tile.tokens) * -(-ids // tile.ids)
        assert number <= 2 * (tokens / chunk + 2 * (tokens * ids) ** 0.5 / chunk + 2)
    if not trained:
        assert tile.ids == ids


def test_tiles_of_a_real_size() -> None:
    assert gradient_tile(8192, 157184, 1024, True) == (8192, 19648)
    assert gradient_tile(8192, 157184, 1024, False) == (1024, 157184)
    # tp 8 and a long row: about square, not all tokens and a sliver of the vocabulary.
    assert gradient_tile(131072, 19648, 1024, True) == (4485, 4480)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("total_dtype", [torch.float64, torch.float32])
def test_products_are_summed_in_the_wider_dtype(
    dtype: torch.dtype, total_dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(7, 300, generator=generator).to(dtype)
    b = torch.randn(300, 5, generator=generator).to(dtype)
    total = torch.randn(7, 5, generator=generator).to(total_dtype)
    exact = a.double() @ b.double()
    expected = total.double() + exact
    add_product_(total, a, b)
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=SUMMED_FP32)
    wide = torch.promote_types(dtype, total_dtype)
    found = product(a, b, wide)
    assert found.dtype == wide
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=SUMMED_FP32)


@pytest.mark.parametrize(
    ("logits", "labels", "match"),
    [
        (torch.zeros(3, 4, 5), torch.zeros(3).long(), r"logits=\(3, 4, 5\) do not fit a matrix"),
        (torch.zeros(3, 0), torch.zeros(3).long(), r"logits=\(3, 0\) do not fit a matrix"),
        (torch.zeros(3, 4), torch.zeros(4).long(), r"do not fit {'labels': \(4,\)}"),
        (torch.zeros(3, 4), torch.zeros(3), "labels are torch.float32; give int64"),
        (torch.zeros(3, 4).long(), torch.zeros(3).long(), "is not supported"),
        (torch.zeros(3, 4), torch.zeros(3, device="meta").long(), "move them to one device"),
    ],
)
def test_wrong_inputs_are_refused(logits: Any, labels: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        inspect.unwrap(logit_statistics)(logits, labels)
    rows = torch.zeros(3)
    with pytest.raises(ValueError, match=match):
        inspect.unwrap(logits_to_gradient_)(logits, labels, rows, rows)
    with pytest.raises(ValueError, match="'grad'"):
        inspect.unwrap(logits_to_gradient_)(
            torch.zeros(3, 4), torch.zeros(3).long(), rows, torch.zeros(2)
        )


def test_labels_outside_the_vocabulary_are_refused() -> None:
    check_labels(torch.tensor([0, 4]), 5)
    check_labels(torch.zeros(0).long(), 5)
    for wrong in (-1, 5):
        with pytest.raises(ValueError, match="not within a vocabulary of 5 ids; give token ids"):
            check_labels(torch.tensor([0, wrong, 4]), 5)
