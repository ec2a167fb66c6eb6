"""What a machine lacks is said before anything is built."""

import pytest
import torch

from ring_train.model.build import check_backends
from ring_train.plan import PlanError, make_plan
from tests.unit.plan.configs import tiny


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    "word", ["kernels.lightning=triton", "kernels.lightning=fla", "kernels.fused=triton"]
)
def test_kernels_of_a_gpu_are_refused_without_one(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(PlanError, match=f"{word}: .* are on cpu; choose torch or auto"):
        check_backends(make_plan(tiny(word), 1))


def test_kernels_that_no_layer_needs_may_be_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    softmax = tiny("kernels.lightning=fla", "model.layer_group_size=1")
    check_backends(make_plan(softmax, 1))


def test_every_machine_has_what_auto_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for precision in ("fp32", "bf16"):
        check_backends(make_plan(tiny(f"train.precision={precision}"), 1))
