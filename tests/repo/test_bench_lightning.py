"""What bench/lightning.py can be shown to do without a GPU: its oracle, its rows, its gates."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import lightning, lightning_gpu
from ring_train.ops.lightning import lightning_attention_recurrent_reference

ROUNDING = 1e-12  # fp64, sums of some hundred terms


def test_the_oracle_is_the_recurrence() -> None:
    inputs = lightning.make_inputs((150,), 2, 8, torch.float64)
    boundaries = torch.tensor([0, 150])

    def forward() -> torch.Tensor:
        return lightning_attention_recurrent_reference(
            *(inputs.q, inputs.k, inputs.v, inputs.slopes.double()), cu_seqlens=boundaries
        )[0]

    expected = lightning.both_passes(forward, inputs)()
    found = lightning.exact(inputs, block=64)
    assert max(lightning.errors(found, expected).values()) < ROUNDING
    naive = lightning.both_passes(lightning.naive(inputs), inputs)()
    assert max(lightning.errors(naive, expected).values()) < ROUNDING


def test_rows_of_a_shape_have_the_rates_of_their_times() -> None:
    times = iter([2.0, 4.0] * 2)

    def time_ms(function: Callable[[], Any]) -> float:
        function()
        return next(times)

    names = ["torch", "flash"]
    rows = lightning_gpu.gpu_rows((2, 3, 128), names, copy_rate=1e9, time_ms=time_ms, device="cpu")
    assert [row["name"] for row in rows] == names
    # 2 * 3 * 128 tokens and heads of 128 channels: 4 and 11 tensors of 2 bytes in 2 and 4 ms.
    unit = 2 * 3 * 128 * 128 * 2
    assert rows[0]["forward_gb_per_s"] == pytest.approx(4 * unit / 2e-3 / 1e9)
    assert rows[0]["both_roofline_fraction"] == pytest.approx(11 * unit / 4e-3 / 1e9)
    assert rows[0]["both_tflops"] == pytest.approx(2 * 3 * 128 * (81920 + 204800) / 4e-3 / 1e12)


def test_errors_are_those_of_bf16_results() -> None:
    accuracy = lightning_gpu.gpu_errors(["torch"], device="cpu")
    assert 1e-4 < max(accuracy["torch"].values()) < lightning_gpu.BF16_ERROR


def test_documents_fill_the_row() -> None:
    lengths = lightning_gpu.document_lengths(32768)
    assert sum(lengths) == 32768
    assert min(lengths) > 0
    assert 8 < len(lengths) < 64


@pytest.mark.parametrize(
    ("fla_ms", "packed_ms", "fraction", "missed"),
    [
        (3.0, 2.1, 0.5, set()),
        (2.9, 2.1, 0.5, {"fla over ours, both_ms"}),
        (3.0, 2.5, 0.5, {"packed over one row, speed"}),
        (3.0, 2.1, 0.3, {"fraction of the byte roofline"}),
    ],
)
def test_goals_on_a_gpu_are_judged_by_the_worst_shape(
    fla_ms: float, packed_ms: float, fraction: float, missed: set[str]
) -> None:
    shape = {"rows": 1, "heads": 16, "tokens": 65536, "both_roofline_fraction": fraction}
    rows = [
        {"name": "triton", "forward_ms": 1.0, "both_ms": 2.0, **shape},
        {"name": "fla", "forward_ms": 1.5, "both_ms": fla_ms, **shape},
        {"name": "triton, packed", "forward_ms": 1.0, "both_ms": packed_ms, **shape},
    ]
    gates = lightning_gpu.gpu_gates(rows, {"triton": {"o": 1e-3}})
    assert {gate["gate"] for gate in gates if not gate["met"]} == missed
    assert len(gates) == 5
