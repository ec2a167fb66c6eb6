"""Initial weights that do not depend on the layout (model-spec 2.6).

Every tensor is drawn from a generator seeded by (seed, logical name) and then cut for this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from ring_train.model.tensors import local_tensors
from ring_train.ops.drawing import named_generator
from ring_train.plan import Plan

SCALED_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")
"""Projections into the residual stream: std / sqrt(2 L)."""


@torch.no_grad()
def initialise(chunks: Iterable[torch.nn.Module], plan: Plan) -> None:
    """Write the initial weights: N(0, std^2), norms 1, expert bias 0; of adapters see `_draw`.

    Draws in fp32 on the host and casts, so fp32 and bf16 runs start from the same point.
    """
    for item in local_tensors(chunks):
        if item.name.endswith(("expert_bias", "lora_b")):
            item.tensor.zero_()
        elif item.tensor.dim() == 1:
            item.tensor.fill_(1.0)
        else:
            full = _draw(item.name, item.full_shape, plan)
            item.tensor.copy_(item.shard.of(full))


def _draw(name: str, shape: tuple[int, ...], plan: Plan) -> torch.Tensor:
    """Return the full fp32 tensor of a logical name.

    A of an adapter is uniform in +-1/sqrt(in), as PEFT draws it
    (https://github.com/huggingface/peft, tuners/lora/layer.py, reset_lora_parameters).
    """
    model = plan.config.model
    std = model.init_method_std
    if name.endswith(SCALED_OUTPUTS):
        std /= math.sqrt(2 * model.num_layers)
    generator = named_generator(plan.config.seed, name)
    if name.endswith("lora_a"):
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
