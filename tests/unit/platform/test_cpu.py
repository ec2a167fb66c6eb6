"""The CPU answers in place of CUDA, and our Adam against torch's."""

import subprocess
import sys
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _platform(warm_megatron: None) -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA answers for itself")


def test_install_happens_once() -> None:
    from ring_train.platform.cpu import install

    depth = len(torch.overrides._get_current_function_mode_stack())
    assert install() is True
    assert len(torch.overrides._get_current_function_mode_stack()) == depth


def test_cuda_requests_give_cpu_tensors() -> None:
    device = torch.cuda.current_device()
    for tensor in (
        torch.zeros(2, device="cuda"),
        torch.zeros(2, device=device),
        torch.zeros(2, device=f"cuda:{device}"),
        torch.zeros(2).cuda(),
        torch.zeros(2).to("cuda"),
        torch.zeros(2).to(torch.device("cuda", 0), torch.float64),
        torch.zeros(2).to(device="cuda", dtype=torch.float64),
        torch.empty(2, pin_memory=True),
    ):
        assert tensor.device.type == "cpu"


def test_other_devices_and_dtypes_are_left_alone() -> None:
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).to(torch.bfloat16).dtype is torch.bfloat16
    assert torch.zeros(2).type(torch.float64).dtype is torch.float64


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float32, "torch.cuda.FloatTensor"), (torch.bfloat16, "torch.cuda.BFloat16Tensor")],
)
def test_type_names_are_those_that_megatron_compares(dtype: torch.dtype, name: str) -> None:
    assert torch.zeros(2, dtype=dtype).type() == name


def test_the_random_state_of_cuda_is_that_of_the_cpu() -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize("decoupled", [True, False])
def test_fused_adam_equals_torch(decoupled: bool) -> None:
    from ring_train.platform.cpu import FusedAdam

    settings: Any = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    theirs = torch.optim.AdamW if decoupled else torch.optim.Adam
    target = torch.linspace(-1, 1, 12).reshape(3, 4)
    weights = [torch.nn.Parameter(torch.ones(3, 4)) for _ in range(2)]
    optimizers: list[torch.optim.Optimizer] = [
        FusedAdam([weights[0]], adam_w_mode=decoupled, **settings),
        theirs([weights[1]], **settings),
    ]
    for _ in range(5):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            optimizer.zero_grad()
            (weight - target).pow(4).sum().backward()
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)


def test_fused_adam_keeps_its_step_in_the_group_and_its_moments_by_parameter() -> None:
    from ring_train.platform.cpu import FusedAdam

    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = FusedAdam([{"params": [used, unused]}, {"params": []}])
    used.sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert state["state"].keys() == {0}
    assert state["state"][0].keys() == {"exp_avg", "exp_avg_sq"}
    assert [group.get("step") for group in state["param_groups"]] == [1, None]


def test_importing_the_platform_says_nothing() -> None:
    command = [sys.executable, "-c", "import ring_train.platform"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
