"""The decay slopes of the exported modeling file are those that the trainer uses."""

import json

import pytest
import torch

from ring_train.hf.modeling.configuration_bailing_moe_linear_v2 import BailingMoeLinearV2Config
from ring_train.hf.modeling.modeling_bailing_moe_linear_v2 import (
    decay_slopes as exported_decay_slopes,
)
from ring_train.ops.decay import decay_slopes
from tests.unit.hf.conftest import GOLDEN


@pytest.mark.parametrize("rule", ["zero_based", "shifted"])
@pytest.mark.parametrize(("num_heads", "num_layers"), [(16, 20), (32, 32), (6, 4), (1, 1), (24, 2)])
def test_slopes_equal_the_trainers(rule: str, num_heads: int, num_layers: int) -> None:
    raw = json.loads((GOLDEN / "ring_linear_v2" / "config.json").read_text())
    raw |= {"num_attention_heads": num_heads, "num_hidden_layers": num_layers}
    config = BailingMoeLinearV2Config(**raw, decay_layer_rule=rule)
    for layer_index in range(num_layers):
        got = torch.tensor(exported_decay_slopes(config, layer_index), dtype=torch.float64)
        wanted = decay_slopes(num_heads, layer_index, num_layers, rule, dtype=torch.float64)
        torch.testing.assert_close(got, wanted, rtol=1e-14, atol=0)
