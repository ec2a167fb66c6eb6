"""What a run hears that chooses Transformer Engine where it cannot compute, and its names."""

import sys
from types import ModuleType

import pytest
import torch

import ring_train.platform  # noqa: F401  (before the first import of megatron-core)
from ring_train.config import Fp8, KernelsConfig, TransformerImpl
from ring_train.config import compose as compose_config
from ring_train.model.build import build_model
from ring_train.model.engine import check_engine
from ring_train.model.tensors import plain_name
from ring_train.plan import PlanError, make_plan

ENGINE = KernelsConfig(transformer_impl=TransformerImpl.transformer_engine)
FP8 = KernelsConfig(transformer_impl=TransformerImpl.transformer_engine, fp8=Fp8.blockwise)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    name = "transformer_engine.pytorch"
    monkeypatch.setitem(sys.modules, name, ModuleType(name))


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")


def test_a_run_without_the_library_is_refused_before_its_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    overrides = ["model=tiny", "kernels=transformer_engine", "train.precision=bf16"]
    plan = make_plan(compose_config("pretrain", overrides), 1)
    groups = None  # it is not come to
    with pytest.raises(PlanError, match=r"cannot be imported here .*install it .*kernels=standard"):
        build_model(plan, groups)  # pyrefly: ignore[bad-argument-type]


def test_a_library_that_breaks_at_its_import_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: libnccl.so.2 is missing")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(PlanError, match=r"libnccl\.so\.2 is missing"):
        check_engine(ENGINE)


@pytest.mark.parametrize("kernels", [ENGINE, FP8])
def test_a_machine_without_a_gpu_is_refused(
    kernels: KernelsConfig, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlanError, match=r"needs a GPU.*choose kernels=standard"):
        check_engine(kernels)


def test_fp8_needs_a_hopper_and_bf16_does_not(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, (8, 9))
    check_engine(ENGINE)
    with pytest.raises(PlanError, match=r"9\.0 \(H100\).*A GPU has 8\.9.*transformer_engine"):
        check_engine(FP8)
    for capability in ((9, 0), (10, 0)):
        gpu(monkeypatch, capability)
        check_engine(FP8)


NAMES = {
    "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight": (
        "decoder.layers.1.input_layernorm.weight"
    ),
    "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": (
        "decoder.layers.0.pre_mlp_layernorm.weight"
    ),
    "mtp.layers.0.transformer_layer.mlp.experts.linear_fc1.weight0": (
        "mtp.layers.0.transformer_layer.mlp.experts.local_experts.0.linear_fc1.weight"
    ),
    "decoder.layers.3.mlp.experts.linear_fc2.weight17": (
        "decoder.layers.3.mlp.experts.local_experts.17.linear_fc2.weight"
    ),
}
SAME_NAMES = [
    "decoder.layers.0.input_layernorm.weight",
    "decoder.layers.0.pre_mlp_layernorm.weight",
    "decoder.layers.0.self_attention.linear_qkv.weight",
    "decoder.layers.0.self_attention.q_layernorm.weight",
    "decoder.layers.0.mlp.linear_fc1.weight",
    "decoder.layers.1.mlp.shared_experts.linear_fc1.weight",
    "decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight",
    "decoder.layers.1.mlp.experts.weight1",
]


def test_names_are_those_without_the_library() -> None:
    assert {name: plain_name(name) for name in NAMES} == NAMES
    assert [plain_name(name) for name in SAME_NAMES] == SAME_NAMES
