"""The modeling files: the configs that they refuse, stretched positions, a kernel for plain torch.

Also run on transformers 4.57 from tests/hf457, see test_modeling.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from tests.unit.hf.test_modeling import assert_same, edit_config, load, make_folder

# cos and sin at 300 of frequencies that were rounded to fp32.
YARN_ABSOLUTE = 5e-5
# Sums of 70 products in double, in another order.
KERNEL_ABSOLUTE = 1e-10
# Products in TF32, of 10 bits.
FLA_RELATIVE = 5e-3


@pytest.fixture
def ring(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "ring", "ring_linear_v2", "zero_based")


def test_a_linear_model_needs_a_decay_rule(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "ring", "ring_linear_v2", None)
    with pytest.raises(ValueError, match=r"decay_layer_rule=None; it must be 'zero_based'.*'shift"):
        load(folder)
    model = load(folder, decay_layer_rule="shifted")
    assert model.config.decay_layer_rule == "shifted"


def test_an_unknown_decay_rule_is_refused(ring: Path) -> None:
    edit_config(ring, decay_layer_rule="one_based")
    with pytest.raises(ValueError, match="decay_layer_rule='one_based'; it must be"):
        load(ring)


def test_missing_keys_are_named(ring: Path) -> None:
    edit_config(ring, routed_scaling_factor=None, group_norm_size=None)
    match = r"lacks \['routed_scaling_factor', 'group_norm_size'\]"
    with pytest.raises(ValueError, match=match):
        AutoConfig.from_pretrained(ring, trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("ring_linear_v2", "score_function", "softmax"),
        ("ring_linear_v2", "tie_word_embeddings", True),
        ("ring_linear_v2", "linear_rope", False),
        ("ring_lite_v1", "score_function", "sigmoid"),
        ("ring_lite_v1", "use_qk_norm", True),
    ],
)
def test_what_the_code_does_not_implement_is_refused(
    tmp_path: Path, name: str, key: str, value: Any
) -> None:
    folder = make_folder(tmp_path / name, name, None)
    edit_config(folder, **{key: value})
    with pytest.raises(ValueError, match=f"{key}={value!r}; this modeling file implements"):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)


def test_the_width_of_a_head_may_be_said(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "lite", "ring_lite_v1", None)
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).head_dim == 32
    edit_config(folder, head_dim=16)
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).head_dim == 16


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("original", [64, 4096, 32768])
def test_yarn_is_that_of_transformers(ring: Path, original: int) -> None:
    """Up to rounding: transformers rounds the frequencies in another order."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    edit_config(ring, rope_scaling={**YARN, "original_max_position_embeddings": original})
    model = load(ring)
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](model.config, "cpu")
    positions = torch.arange(300)
    cos, sin = model.model.rope_table(positions[None], torch.float64)
    angles = positions[:, None].double() * torch.cat([frequencies, frequencies]).double()
    wanted = {"cos": scale * angles.cos(), "sin": scale * angles.sin()}
    for name, got in (("cos", cos), ("sin", sin)):
        torch.testing.assert_close(got[0, 0], wanted[name], atol=YARN_ABSOLUTE, rtol=0)


@pytest.mark.parametrize("rule", ["zero_based", "shifted"])
def test_a_saved_config_keeps_decay_rule_and_yarn(ring: Path, tmp_path: Path, rule: str) -> None:
    edit_config(ring, rope_scaling=YARN, decay_layer_rule=rule)
    model = load(ring)
    model.save_pretrained(tmp_path / "again")
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    assert raw["rope_scaling"] == YARN
    assert raw["decay_layer_rule"] == rule
    again = load(tmp_path / "again")
    assert again.config.yarn == YARN
    layers = [m.slopes for m in model.modules() if hasattr(m, "slopes")]
    assert [m.slopes for m in again.modules() if hasattr(m, "slopes")] == layers
    ids = torch.arange(100)[None] * 5
    assert_same(again(ids).logits, model(ids).logits)


def fla_contract(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g_gamma: torch.Tensor,
    scale: float | None,
    initial_state: torch.Tensor,
    output_final_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What flash-linear-attention documents of chunk_simple_gla, token by token."""
    assert output_final_state
    state, outputs = initial_state, []
    for t in range(q.shape[1]):
        update = k[:, t, :, :, None] * v[:, t, :, None]
        state = g_gamma.exp()[:, None, None] * state + update
        outputs.append(torch.einsum("bnd,bnde->bne", q[:, t], state))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return scale * torch.stack(outputs, dim=1), state


def test_a_kernel_gets_what_plain_torch_gets(ring: Path) -> None:
    """The kernel itself needs a GPU; this holds the call to its contract."""
    module = sys.modules[type(load(ring)).__module__]
    generator = torch.Generator().manual_seed(1)
    qkv = tuple(torch.randn(2, 4, 70, 8, generator=generator).double() for _ in range(3))
    state = torch.randn(2, 4, 8, 8, generator=generator).double()
    slopes = torch.tensor([0.5, 0.1, 0.02, 1.3], dtype=torch.float64)
    wanted = module.lightning_attention(qkv, slopes, state)
    got = module.lightning_attention_by(fla_contract, qkv, slopes, state)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=KERNEL_ABSOLUTE, rtol=0)
    hidden = torch.zeros(1, 5, 8, dtype=torch.bfloat16)
    assert module.lightning_kernel(hidden) is None  # not on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_fla_gives_what_plain_torch_gives(ring: Path) -> None:
    module = sys.modules[type(load(ring)).__module__]
    if module.fla_kernel() is None:
        pytest.skip("flash-linear-attention is not installed")
    generator = torch.Generator().manual_seed(1)
    qkv = tuple(torch.randn(2, 4, 200, 64, generator=generator).cuda() for _ in range(3))
    state = torch.randn(2, 4, 64, 64, generator=generator).cuda()
    slopes = torch.tensor([0.5, 0.1, 0.02, 1.3]).cuda()
    wanted = module.lightning_attention(qkv, slopes, state)
    got = module.lightning_attention_by(module.fla_kernel(), qkv, slopes, state)
    for one, other in zip(got, wanted, strict=True):
        assert ((one - other).norm() / other.norm()).item() < FLA_RELATIVE


@pytest.mark.parametrize("scaling", [None, YARN])
def test_engines_find_the_rope_base_in_the_config(ring: Path, scaling: dict | None) -> None:
    """Servers with transformers 5 read it there; transformers 4 has no such attribute."""
    edit_config(ring, rope_scaling=scaling)
    config = AutoConfig.from_pretrained(ring, trust_remote_code=True)
    kind = scaling or {"rope_type": "default"}
    if hasattr(type(config), "rope_scaling"):
        assert config.rope_parameters == {**kind, "rope_theta": 1_000_000}
    assert config.to_dict()["rope_scaling"] == scaling


def test_shared_experts_are_one_mlp_of_their_widths_together(ring: Path) -> None:
    """Two of half the width are the tensors of one; the config gives the width of one of them."""
    before = load(ring).state_dict()
    width = json.loads((ring / "config.json").read_text())["moe_shared_expert_intermediate_size"]
    edit_config(ring, num_shared_experts=2, moe_shared_expert_intermediate_size=width // 2)
    after = load(ring).state_dict()
    assert {name: x.shape for name, x in after.items()} == {n: x.shape for n, x in before.items()}
    assert all(torch.equal(after[name], x) for name, x in before.items())
