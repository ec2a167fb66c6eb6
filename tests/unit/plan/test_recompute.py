"""Keys of activation recomputation that contradict each other are refused with a way out."""

import warnings

import pytest

from ring_train.plan import PlanError, make_plan
from ring_train.plan.megatron import make_transformer_config
from tests.unit.plan.configs import tiny

FULL = "parallel.recompute_granularity=full"
SELECTIVE = "parallel.recompute_granularity=selective"
METHOD = "parallel.recompute_method=block"
LAYERS = "parallel.recompute_num_layers=2"
MODULES = "parallel.recompute_modules=[core_attn,moe]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [METHOD],
            "parallel.recompute_method=block contradicts parallel.recompute_granularity=null, "
            "which recomputes nothing; remove it or choose full",
        ),
        (
            [MODULES],
            "contradicts parallel.recompute_granularity=null, which recomputes nothing; re",
        ),
        (
            [FULL, METHOD],
            "parallel.recompute_granularity=full needs parallel.recompute_num_layers, which is not "
            "given; choose 1 or more",
        ),
        ([FULL, LAYERS], "needs parallel.recompute_method, which is not given; choose uniform or"),
        (
            [FULL, METHOD, LAYERS, MODULES],
            "parallel.recompute_modules=['core_attn', 'moe'] contradicts parallel."
            "recompute_granularity=full, which reads only recompute_method and "
            "recompute_num_layers; remove it or choose selective",
        ),
        (
            [SELECTIVE],
            "needs parallel.recompute_modules, which is not given; choose from core_attn",
        ),
        ([SELECTIVE, MODULES, LAYERS], "parallel.recompute_num_layers=2 contradicts"),
        (
            [SELECTIVE, "parallel.recompute_modules=[mpl]"],
            "parallel.recompute_modules=mpl is not a module that can be recomputed; did you mean "
            "mlp?; choose from core_attn, mlp, moe, shared_experts",
        ),
        ([SELECTIVE, "parallel.recompute_modules=[layernorm]"], "layernorm is not a module that"),
        (
            [FULL, METHOD, "parallel.recompute_num_layers=0"],
            "recompute_num_layers=0 is not positive",
        ),
    ],
)
def test_contradicting_keys_are_named(words: list[str], message: str) -> None:
    with pytest.raises(PlanError, match="=") as caught:
        make_plan(tiny(*words), 1)
    assert any(message in problem for problem in caught.value.problems)


@pytest.mark.parametrize("words", [[FULL, METHOD, LAYERS], [SELECTIVE, MODULES]])
def test_megatron_gets_the_keys_under_its_own_names(words: list[str]) -> None:
    plan = make_plan(tiny(*words), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = make_transformer_config(plan)
    found = {
        name: getattr(config, name)
        for name in ("granularity", "method", "num_layers", "modules")
        for name in [f"recompute_{name}"]
    }
    full = words[0] == FULL
    assert found == {
        "recompute_granularity": "full" if full else "selective",
        "recompute_method": "block" if full else None,
        "recompute_num_layers": 2 if full else None,
        "recompute_modules": [] if full else ["core_attn", "moe"],
    }
