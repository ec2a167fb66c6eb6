"""Parameter and FLOP counts of a model, added up from its mixers (model-spec 1.3)."""

from dataclasses import dataclass

from ring_train.config import ModelConfig
from ring_train.plan.layers import LayerPlan
from ring_train.plan.mixers import CHANNEL_MIXERS, MTP_MIXERS, TOKEN_MIXERS

BACKWARD_FACTOR = 3
"""Forward and backward cost three forwards."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Counts of the whole model; MTP layers apart, expert biases included."""

    num_parameters: int
    num_active_parameters: int
    """Parameters that one token meets, embedding and output layer included."""
    num_active_non_embedding_parameters: int
    """The same without embedding and output layer."""
    num_mtp_parameters: int
    """All MTP layers; they share embedding and output layer."""
    num_active_mtp_parameters: int
    flops_per_token: float
    """Training FLOPs of one token: forward and backward, MTP included."""


def make_cost(model: ModelConfig, layers: LayerPlan, seq_length: int) -> Cost:
    """Return the counts of a legal layer pattern at one row length in tokens."""
    h, v = model.hidden_size, model.vocab_size
    total = active = 0
    forward_flops = 2.0 * h * v
    for token, channel in zip(layers.token_mixers, layers.channel_mixers, strict=True):
        for mixer in (TOKEN_MIXERS[token], CHANNEL_MIXERS[channel]):
            total += mixer.num_parameters(model)
            active += mixer.num_active_parameters(model)
            forward_flops += mixer.flops_per_token(model, seq_length)
    norms = (2 * model.num_layers + 1) * h
    embeddings = 2 * v * h
    mtp_total, mtp_active, mtp_flops = _mtp_depth(model, seq_length)
    return Cost(
        num_parameters=total + norms + embeddings,
        num_active_parameters=active + norms + embeddings,
        num_active_non_embedding_parameters=active + norms,
        num_mtp_parameters=layers.num_mtp * mtp_total,
        num_active_mtp_parameters=layers.num_mtp * mtp_active,
        flops_per_token=BACKWARD_FACTOR * (forward_flops + layers.num_mtp * mtp_flops),
    )


def _mtp_depth(model: ModelConfig, seq_length: int) -> tuple[int, int, float]:
    """Return parameters, active parameters and forward FLOPs per token of one MTP depth."""
    h = model.hidden_size
    mixers = (TOKEN_MIXERS[MTP_MIXERS[0]], CHANNEL_MIXERS[MTP_MIXERS[1]])
    own = 2 * h * h + 5 * h  # eh_proj; enorm, hnorm, final and the two norms of the layer
    head_flops = 2.0 * h * (2 * h + model.vocab_size)
    return (
        own + sum(mixer.num_parameters(model) for mixer in mixers),
        own + sum(mixer.num_active_parameters(model) for mixer in mixers),
        head_flops + sum(mixer.flops_per_token(model, seq_length) for mixer in mixers),
    )
